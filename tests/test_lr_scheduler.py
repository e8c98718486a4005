import pytest
import torch
from support import assert_matches, cases, golden

from ldm import lr_scheduler
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2

CASE = cases("lr")[0]
ONE_CYCLE = {"warm_up_steps": [4], "f_min": [0.0], "f_max": [1.0], "f_start": [0.2], "cycle_lengths": [12]}


@pytest.mark.parametrize("label", CASE["params"]["schedulers"])
def test_every_scheduler_gives_the_multipliers_of_the_original(label):
    scheduler = getattr(lr_scheduler, label.split(":")[0])(**CASE["params"]["schedulers"][label])
    got = torch.tensor([scheduler(n) for n in CASE["params"]["n"]], dtype=torch.float64)
    assert_matches(got, golden("training")[f"lr_schedulers/{label}"], tolerance=1e-12)


def test_the_warm_up_is_a_straight_line_from_f_start_to_f_max():
    scheduler = LambdaLinearScheduler(**ONE_CYCLE)
    assert [scheduler(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("kind", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])
def test_after_the_last_cycle_the_final_value_stays(kind):
    scheduler = kind(**{**ONE_CYCLE, "f_min": [0.3]})
    assert scheduler(12) == scheduler(1000) == pytest.approx(0.3)


def test_a_warm_up_of_no_steps_starts_at_the_top():
    assert LambdaLinearScheduler([0], [1.0], [1.0], [1e-6], [10])(0) == 1.0


def test_a_cycle_with_a_missing_entry_is_refused():
    with pytest.raises(ValueError, match="one entry a cycle"):
        LambdaLinearScheduler([1, 2], [1.0], [1.0], [1e-6], [10])


def test_the_last_multiplier_is_remembered_under_both_classical_names():
    scheduler = LambdaWarmUpCosineScheduler(10, lr_min=0.0, lr_max=1.0, lr_start=0.5, max_decay_steps=100)
    assert scheduler(5) == scheduler.last_lr == scheduler.last_f == 0.75


def test_the_multiplier_is_logged_at_the_interval(caplog):
    caplog.set_level("INFO", logger="ldm.lr_scheduler")
    scheduler = LambdaLinearScheduler(**ONE_CYCLE, verbosity_interval=5)
    for n in range(7):
        scheduler(n)
    assert [record.args[0] for record in caplog.records] == [0, 5]


def test_lambda_lr_scales_the_learning_rate_by_the_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, LambdaLinearScheduler(**ONE_CYCLE).schedule)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.04])
