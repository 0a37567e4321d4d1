"""The tests; `tests.helpers` is what they share."""
