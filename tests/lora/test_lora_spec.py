import math
from dataclasses import FrozenInstanceError

import pytest

from lorax import LoraSpec, LoraxError

BAD_VALUES = [
    ({"rank": 0}, "lora.rank=0", "at least 1"),
    ({"rank": -3}, "lora.rank=-3", "at least 1"),
    ({"rank": 2.0}, "lora.rank=2.0", "whole number"),
    ({"rank": True}, "lora.rank=True", "whole number"),
    ({"rank": None}, "lora.rank=None", "whole number"),
    ({"alpha": 0}, "lora.alpha=0", "positive"),
    ({"alpha": -1.0}, "lora.alpha=-1.0", "positive"),
    ({"alpha": math.nan}, "lora.alpha=nan", "positive"),
    ({"alpha": math.inf}, "lora.alpha=inf", "positive"),
    ({"alpha": "8"}, "lora.alpha='8'", "positive"),
    ({"alpha": True}, "lora.alpha=True", "positive"),
    ({"scaling": "sqrt"}, "lora.scaling='sqrt'", "'lora' or 'rslora'"),
    ({"scaling": ["lora"]}, "lora.scaling=['lora']", "'lora' or 'rslora'"),
    ({"init": "zeros"}, "lora.init='zeros'", "'kaiming_uniform'"),
    ({"init": None}, "lora.init=None", "'kaiming_uniform'"),
    ({"dropout": 1.0}, "lora.dropout=1.0", "[0, 1)"),
    ({"dropout": -0.1}, "lora.dropout=-0.1", "[0, 1)"),
    ({"dropout": math.nan}, "lora.dropout=nan", "[0, 1)"),
    ({"dropout": "0.1"}, "lora.dropout='0.1'", "[0, 1)"),
    ({"dropout": None}, "lora.dropout=None", "[0, 1)"),
    ({"targets": ()}, "lora.targets", "name at least one"),
    ({"targets": ""}, "lora.targets=''", "a name or a list of names"),
    ({"targets": 5}, "lora.targets=5", "a name or a list of names"),
    ({"exclude": None}, "lora.exclude=None", "a name or a list of names"),
    ({"modules_to_save": (1,)}, "lora.modules_to_save=(1,)", "a name or a list of names"),
    ({"layers": 3}, "lora.layers=3", "whole numbers"),
    ({"layers": "01"}, "lora.layers='01'", "whole numbers"),
    ({"layers": (-1,)}, "lora.layers=(-1,)", "whole numbers from 0"),
    ({"rank_pattern": {"query": 0}}, "lora.rank_pattern[query]=0", "at least 1"),
    ({"rank_pattern": {1: 2}}, "lora.rank_pattern={1: 2}", "a mapping"),
    ({"rank_pattern": "query"}, "lora.rank_pattern='query'", "a mapping"),
    ({"rank_pattern": 4}, "lora.rank_pattern=4", "a mapping"),
    ({"alpha_pattern": {"query": 0}}, "lora.alpha_pattern[query]=0", "positive"),
    ({"alpha_pattern": {"(": 1}}, "'('", "not a valid regex"),
    ({"targets": "*"}, "'*'", "not a valid regex"),
    ({"exclude": "["}, "'['", "not a valid regex"),
    ({"kernel_axes": {"query": 3}}, "lora.kernel_axes[query]=3", "'iio'"),
]


@pytest.mark.parametrize(("values", "offender", "remedy"), BAD_VALUES)
def test_bad_value_is_refused_with_its_name_and_the_remedy(values, offender, remedy):
    with pytest.raises(LoraxError) as caught:
        LoraSpec(**values)
    assert offender in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_specs_are_one_key_however_they_were_written():
    lists = LoraSpec(4, targets=["q", "v"], exclude=["x"], layers=[0], rank_pattern=[["v", 2]])
    tuples = LoraSpec(4, targets=("q", "v"), exclude="x", layers=range(1), rank_pattern={"v": 2})
    assert len({lists, tuples}) == 1
    assert lists != LoraSpec(4, targets=("q", "v"), exclude="x", layers=(0,))


def test_a_spec_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LoraSpec().rank = 4  # type: ignore[misc]


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_scale_laws(rank):
    path = "layers.0.query.kernel"
    assert LoraSpec(rank, alpha=16).scale(path) == 16 / rank
    assert LoraSpec(rank, alpha=16, scaling="rslora").scale(path) == 16 / rank**0.5


def test_patterns_set_rank_alpha_and_so_the_scale():
    spec = LoraSpec(8, 16, rank_pattern={"value": 2}, alpha_pattern={r".*\.1\..*": 4})
    ranks_and_scales = {
        path: (spec.rank_of(path), spec.alpha_of(path), spec.scale(path))
        for path in ("layers.0.query.kernel", "layers.0.value.kernel", "layers.1.value.kernel")
    }
    assert list(ranks_and_scales.values()) == [(8, 16, 2.0), (2, 16, 8.0), (2, 4, 2.0)]


def test_first_matching_pattern_counts():
    spec = LoraSpec(8, rank_pattern={r"layers\.0\..*": 2, "query": 4})
    assert spec.rank_of("layers.0.query.kernel") == 2
    assert spec.rank_of("layers.1.query.kernel") == 4
