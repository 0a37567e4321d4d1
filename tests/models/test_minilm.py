"""The default encoder against its published zero-shot score."""

import pytest

from tests.helpers.zero_shot import stsb_spearman

pytestmark = pytest.mark.production  # 3,000 texts


def test_zero_shot_stsb():
    assert stsb_spearman("assets/minilm") == pytest.approx(0.8672, abs=5e-4)
