"""What tests share: small models, worlds and sweeps, and ways to compare them."""
