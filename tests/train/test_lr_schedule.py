import pytest

from lorax.errors import LoraxError
from lorax.train.schedule import lr_factor


def theirs(name, total, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        get = getattr(transformers, f"get_{name}_schedule_with_warmup")
        schedule = get(optimizer, warmup, total)
    return schedule.lr_lambdas[0]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "ratio", "warmup"), [(40, 0.0, 0), (37, 0.1, 4), (50, 0.9, 45)])
def test_every_step_is_transformers(name, total, ratio, warmup):
    factor, expected = lr_factor(name, total, ratio), theirs(name, total, warmup)
    assert [factor(step) for step in range(total + 1)] == pytest.approx(
        [expected(step) for step in range(total + 1)], abs=1e-6
    )


def test_an_unknown_schedule_is_refused():
    with pytest.raises(LoraxError, match="'step' is unknown"):
        lr_factor("step", 10, 0.1)
