"""MPNet's weights against their zero-shot score."""

import pytest

from tests.helpers.zero_shot import stsb_spearman


def test_zero_shot_stsb():
    assert stsb_spearman("assets/mpnet") == pytest.approx(0.8811, abs=5e-4)
