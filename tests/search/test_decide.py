"""Choosing: feasible first, then the objective, then quality between equal speeds."""

import pytest

from made_up_trials import ALL, BASELINE, INT4_G32, INT4_G128, INT8, measured, trial
from trilemma.core.errors import LimitError
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe, Step
from trilemma.search.decide import best_of, choose, objective_for
from trilemma.search.judge import judge_trial
from trilemma.search.sentence import infeasible, ship


def limits(*texts):
    return [Limit.parse(text) for text in texts]


def pick(*texts, trials=ALL, minimize=None, accept_estimates=False):
    given = limits(*texts)
    objective = objective_for(given, minimize)
    return choose(trials, given, objective, BASELINE, accept_estimates=accept_estimates), objective


def test_default_objectives():
    assert objective_for([]).text == "least tpot_s with ppl_increase<=1%"
    assert objective_for(limits("weights<=50%")).metric == "kl_mean"
    assert objective_for(limits("weights<=50%", "ppl_increase<=2%")).metric == "tpot_s"
    assert objective_for([], "weights").metric == "weights_bytes"
    assert objective_for([], "decode").text.startswith("most decode")
    with pytest.raises(LimitError, match="nonsense"):
        objective_for([], "nonsense")


def test_no_limits_takes_the_fastest_within_one_per_cent():
    choice, _ = pick()
    assert choice.trial is INT8
    assert choice.alternatives["safest"] == "W8A8"


def test_limits_without_quality_take_the_least_kl():
    choice, _ = pick("weights<=50%")
    assert choice.trial is INT8
    choice, _ = pick("weights<=40%")
    assert choice.trial is INT4_G32


def test_limits_with_quality_take_the_fastest():
    choice, objective = pick("weights<=50%", "tpot<=90%", "ppl_increase<=2%")
    assert choice.trial is INT4_G32
    assert choice.status == "feasible"
    sentence = ship(choice.trial, BASELINE, choice.verdicts, objective)
    assert sentence.startswith("Ship W4A8-g32: 31.4% of the weight bytes")
    assert "binds is weights<=50%" in sentence


def test_speeds_that_noise_can_not_tell_apart_are_decided_by_kl():
    twin = trial("twin", weights=4.5e6, tpot=1.01e-3, kl=1e-3, ppl=0.002)
    choice, _ = pick("ppl_increase<=2%", trials=[*ALL, twin])
    assert choice.trial is twin


def test_a_margin_keeps_off_the_edge_but_yields_when_nothing_else_is_left():
    edge = trial("edge", weights=4e6, tpot=0.9e-3, kl=1e-2, ppl=0.0194, half=0.0005)
    choice, _ = pick("ppl_increase<=2%", trials=[*ALL, edge])
    assert choice.trial is INT4_G32
    choice, _ = pick("ppl_increase<=2%", "weights<=30%", trials=[*ALL, edge])
    assert choice.trial is edge


def test_infeasible_names_what_blocks_and_the_nearest():
    choice, _ = pick("weights<=10%", "ppl_increase<=2%")
    assert choice.status == "infeasible"
    assert choice.trial is None
    assert choice.blocking.text == "weights<=10%"
    assert choice.nearest[0][0] is INT4_G128 or choice.nearest[0][0] is INT4_G32
    text = infeasible(choice, 4)
    assert "weights<=10% blocks" in text
    assert "beyond" in text


def test_undecided_when_the_only_obstacle_is_an_estimate():
    def with_energy(t, joule):
        guess = measured("energy_j_per_output_token", joule, joule / 10, source="estimated")
        return t.model_copy(update={"measurements": {**t.measurements, "energy_j_per_output_token": guess}})

    trials = [with_energy(t, j) for t, j in zip(ALL, (1.0, 0.7, 0.5, 0.4), strict=True)]
    choice, _ = pick("energy<=0.8J", trials=trials)
    assert choice.status == "undecided"
    assert choice.trial.name == "W8A8"
    choice, _ = pick("energy<=0.8J", trials=trials, accept_estimates=True)
    assert choice.status == "feasible"


def test_an_unavailable_metric_leaves_it_undecided_not_infeasible():
    none = Measurement.unavailable("energy", "no counter")
    trials = [t.model_copy(update={"measurements": {**t.measurements, none.metric: none}}) for t in ALL]
    choice, _ = pick("energy<=0.8J", trials=trials)
    assert choice.status == "undecided"
    assert choice.trial is not None


def test_dropped_and_failed_trials_are_never_chosen():
    dead = trial("dead", weights=1e6, tpot=1e-4, kl=1e-6, ppl=0.0, status="failed")
    choice, _ = pick("ppl_increase<=2%", trials=[*ALL, dead])
    assert choice.trial is not dead


def test_more_is_better_metrics_turn_the_objective():
    trials = [
        t.model_copy(update={"measurements": {**t.measurements, "decode_tokens_per_s": measured("decode", d, 1)}})
        for t, d in zip(ALL, (500.0, 700.0, 1000.0, 800.0), strict=True)
    ]
    choice, _ = pick("weights<=99%", trials=trials, minimize="decode")
    assert choice.trial.name == "W4A8-g32"


def test_an_unmodified_model_can_win():
    choice, objective = pick("ppl_increase<=0.05%")
    assert choice.trial is BASELINE
    assert "the unmodified model" in ship(choice.trial, BASELINE, choice.verdicts, objective)


def test_judge_trial_prefers_the_paired_baseline():
    paired = INT8.model_copy(update={"paired_baseline": {"tpot_s": measured("tpot_s", 1e-3, 1e-6)}})
    assert judge_trial(paired, limits("tpot<=90%"), BASELINE)[0].outcome == "FAIL"
    assert judge_trial(INT8, limits("tpot<=90%"), BASELINE)[0].outcome == "PASS"


def test_equal_formats_cost_the_same_whatever_noise_says():
    settings = {"weights": "int4-g32", "embedding": "int8-g32"}
    plain = INT4_G32.model_copy(update={"recipe": Recipe(steps=(Step(technique="rtn", settings=settings),))})
    tuned = trial("W4A8-g32-gptq", weights=4.4e6, tpot=1.2e-3, kl=5e-3, ppl=0.005).model_copy(
        update={"recipe": Recipe(steps=(Step(technique="gptq", settings=settings | {"damping": 0.02}),))}
    )
    assert best_of([plain, tuned, INT8], "tpot_s", BASELINE) == tuned
    steps = (Step(technique="awq", settings=settings), *tuned.recipe.steps, Step(technique="tune-scales"))
    longer = tuned.model_copy(update={"recipe": Recipe(steps=steps)})
    assert best_of([plain, longer, INT8], "tpot_s", BASELINE) == longer
    for turned, best in (({}, "turned"), ({"tied": "untie"}, "plain")):  # untied, the head is read beside the embedding
        steps = (Step(technique="rotate", settings=turned), *tuned.recipe.steps)
        rotated = tuned.model_copy(update={"recipe": Recipe(steps=steps)})
        assert best_of([plain, rotated, INT8], "tpot_s", BASELINE) == {"turned": rotated, "plain": plain}[best]
    other = tuned.model_copy(
        update={"recipe": Recipe(steps=(Step(technique="gptq", settings=settings | {"embedding": "bf16"}),))}
    )
    assert best_of([plain, other, INT8], "tpot_s", BASELINE) == plain
