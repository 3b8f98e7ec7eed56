"""From trials to a report: front, choice, confirm run, verdicts, and the decision in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trilemma.core.environment import Environment, read_environment
from trilemma.core.payback import Payback
from trilemma.core.results import Answer, ByteRow, Conditions, Decision, OptimizeReport
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.data.windows import TokenSet
from trilemma.measure.energy.build_cost import BUILD_METRICS
from trilemma.model.model import Model
from trilemma.runtime.engine import Engine
from trilemma.search import sentence
from trilemma.search.confirm import ANSWER_PROMPTS, PROMPT_TOKENS, TEXT_MARGINS, answers, byte_rows, confirm_trial
from trilemma.search.decide import Choice, Objective, choose
from trilemma.search.explore import Exploration
from trilemma.search.front import pareto_front
from trilemma.search.judge import EXIT_CODES, binding, is_quality, judge_trial, outcome_of
from trilemma.search.payback import paybacks
from trilemma.search.result import OptimizeResult
from trilemma.search.texts import prompts_of

FRONT_AXES = ("weights_bytes", "tpot_s", "kl_mean")
ENOUGH_MORE = 1.5  # times the text, or it is not worth another look
LEAST_OVERRUN_S, MOST_OVERRUN = 5.0, 0.25  # what the confirm run may take beyond the time, rather than be left out


@dataclass(frozen=True)
class Conclusion:
    """What the confirm run left: nothing but the decision when no trial was chosen."""

    decision: Decision
    verdicts: tuple[Verdict, ...]
    confirmed: Trial | None = None
    answers: tuple[Answer, ...] = ()
    bytes_by_role: tuple[ByteRow, ...] = ()
    unfinished: bool = False


def conclude(
    search: Exploration, objective: Objective, *, name: str, model_key: str, command: str, accept_estimates: bool
) -> OptimizeResult:
    """Choose on the select text, confirm on text that nobody saw, and put everything into one record."""
    everything = [search.baseline, *search.trials]
    points = [[trial.value(metric) for metric in FRONT_AXES] for trial in everything]
    front = [everything[index] for index in pareto_front(points, ["lower"] * len(FRONT_AXES))]
    choice = _choose(search, objective, accept_estimates)
    found = _settle(search, objective, choice, accept_estimates)
    used = {part: reference.token_set for part, reference in search.bench.references.items()}
    report = OptimizeReport(
        model=name, model_hash=model_key, runtime=search.bench.runtime, objective=objective.text, limits=search.limits,
        environment=_environment(search, model_key, found.confirmed), data=search.texts.describe(used),
        baseline=search.baseline, trials=tuple(search.trials), front=tuple(trial.name for trial in front),
        confirmed=found.confirmed, verdicts=found.verdicts, decision=found.decision, answers=found.answers,
        bytes_by_role=found.bytes_by_role, seconds=search.deadline.spent_s, command=command,
        notes=(*search.texts.parts.notes, *dict.fromkeys(search.notes)), data_files=search.texts.files,
        conditions=_conditions(search, accept_estimates), payback=_paybacks(search, found.confirmed),
    )  # fmt: skip
    code = EXIT_CODES[found.decision.outcome]
    return OptimizeResult(found.confirmed, tuple(front), found.verdicts, report, code, unfinished=found.unfinished)


def _choose(search: Exploration, objective: Objective, accept_estimates: bool) -> Choice:
    """Among those that were timed side by side if one of them will do: their speeds compare best."""
    plain = Objective(objective.metric, objective.because)  # implied limits are among the search's already
    everything = [search.baseline, *search.trials]

    def best_of(trials: list[Trial]) -> Choice:
        return choose(trials, search.limits, plain, search.baseline, accept_estimates=accept_estimates)

    choice = best_of(everything)
    among_leaders = best_of(
        [trial for trial in everything if trial.status == "baseline" or trial.name in search.leaders]
    )
    if search.leaders and among_leaders.status == "feasible":
        return replace(among_leaders, alternatives=choice.alternatives)
    return choice


def _settle(search: Exploration, objective: Objective, choice: Choice, accept_estimates: bool) -> Conclusion:
    nearest = tuple(trial.name for trial, _ in choice.nearest)
    if choice.trial is None:
        return _infeasible(search, choice, nearest)
    tokens = _confirm_tokens(search)
    if not tokens:
        why = sentence.not_confirmed(choice.trial, search.baseline)
        return _too_short(search, choice, why, search.needed_s(), nearest)
    search.say("confirm", 0, 1, choice.trial.name)
    model, engine = _open_chosen(search, choice.trial)
    try:
        confirmed = confirm_trial(
            search.bench, choice.trial, model, engine, search.limits, search.baseline, search.deadline,
            confirm_texts(search, tokens),
        )  # fmt: skip
        spent = {name: found for name, found in choice.trial.measurements.items() if name in BUILD_METRICS}
        confirmed = confirmed.model_copy(update={"measurements": confirmed.measurements | spent})
        prompt_tokens = min(PROMPT_TOKENS, search.bench.lengths.prompt_tokens)
        prompts = prompts_of(search.texts.parts.confirm, search.texts.tokenizer, ANSWER_PROMPTS, prompt_tokens)
        shown = answers(search.bench.baseline, engine, search.texts.tokenizer, prompts)
    finally:
        if engine is not search.bench.baseline:
            engine.close()
    verdicts = judge_trial(confirmed, search.limits, search.baseline, accept_estimates=accept_estimates)
    tight = binding(verdicts)
    decision = Decision(
        sentence=sentence.ship(confirmed, search.baseline, verdicts, objective), chosen=confirmed.name,
        outcome=outcome_of(verdicts), binding_limit=None if tight is None else tight.limit.text, nearest=nearest,
        alternatives=choice.alternatives,
    )  # fmt: skip
    return Conclusion(decision, verdicts, confirmed, shown, byte_rows(search.model, model))


def _open_chosen(search: Exploration, trial: Trial) -> tuple[Model, Engine]:
    if trial.status == "baseline":
        return search.model, search.bench.baseline
    built, _ = search.build(trial.recipe)
    return built, search.bench.open(built)


def _confirm_tokens(search: Exploration) -> int:
    """Tokens of confirm text that fit into the time left and a little more; 0 when they are too few to judge on."""
    overrun_s = max(LEAST_OVERRUN_S, MOST_OVERRUN * search.deadline.limit_s)
    left_s = search.deadline.limit_s + overrun_s - search.deadline.spent_s
    return search.text_plan.confirm_within(left_s - search.confirm_fixed_s)


def confirm_texts(search: Exploration, tokens: int) -> list[TokenSet]:
    """The confirm text, and up to two larger ones for limits that stay open: each twice the one before.

    How many is decided here, by text and time alone, since every look that may follow widens the interval.
    """
    texts = [search.texts.token_set("confirm", tokens)]
    seconds = search.text_plan.confirm_s / search.text_plan.confirm_tokens  # a token
    spent_s = search.confirm_fixed_s + seconds * tokens
    limited = any(is_quality(limit.metric) for limit in search.limits)
    while limited and len(texts) < len(TEXT_MARGINS):
        tokens *= 2
        spent_s += seconds * tokens
        larger = search.texts.token_set("confirm", tokens)
        if larger.tokens < ENOUGH_MORE * texts[-1].tokens or not search.deadline.allows(spent_s):
            break
        texts.append(larger)
    return texts


def _infeasible(search: Exploration, choice: Choice, nearest: tuple[str, ...]) -> Conclusion:
    """No trial keeps every limit: a FAIL when all that is known was tried, else the time was too short."""
    tried = sum(trial.status == "measured" for trial in search.trials)
    if search.untried:
        why = sentence.not_all_tried(choice, tried, len(search.untried))
        return _too_short(search, choice, why, search.needed_s(search.untried), nearest)
    blocking = None if choice.blocking is None else choice.blocking.text
    dropped = [trial for trial in search.trials if trial.status == "dropped"]
    if not tried and dropped:
        smallest = min(dropped, key=search.predicted_weights)
        text = sentence.none_possible(smallest, blocking or "")
        nearest = (smallest.name,)
    else:
        text = sentence.infeasible(choice, tried)
    decision = Decision(sentence=text, chosen=None, outcome="FAIL", binding_limit=blocking, nearest=nearest)
    return Conclusion(decision, choice.verdicts)


def _paybacks(search: Exploration, confirmed: Trial | None) -> tuple[Payback, ...]:
    """After how many output tokens the chosen model repays its building and the whole search."""
    if confirmed is None or confirmed.status == "baseline":
        return ()
    before = {**search.baseline.measurements, **confirmed.paired_baseline}
    found = paybacks(confirmed.measurements, before, confirmed.measurements)
    if search.meter is not None:
        found += paybacks(search.meter.results(), before, confirmed.measurements, "search")
    return found


def _too_short(search: Exploration, choice: Choice, why: str, needed_s: float, nearest: tuple[str, ...]) -> Conclusion:
    """INCONCLUSIVE whatever the select text says: its verdicts are shown, but they do not decide."""
    text = sentence.too_short(search.deadline.limit_s, needed_s, why)
    blocking = None if choice.blocking is None else choice.blocking.text
    decision = Decision(
        sentence=text, chosen=None if choice.trial is None else choice.trial.name, outcome="INCONCLUSIVE",
        binding_limit=blocking, nearest=nearest, alternatives=choice.alternatives,
    )  # fmt: skip
    return Conclusion(decision, choice.verdicts, unfinished=True)


def _environment(search: Exploration, model_key: str, confirmed: Trial | None) -> Environment:
    engine = search.bench.baseline
    recipe_hash = "" if confirmed is None else confirmed.recipe.hash
    return read_environment(
        isa=engine.isa, threads=engine.threads, model_hash=model_key, seed=search.seed, recipe_hash=recipe_hash
    )


def _conditions(search: Exploration, accept_estimates: bool) -> Conditions:
    lengths = search.bench.lengths
    used = {part: reference.token_set.tokens for part, reference in search.bench.references.items()}
    return Conditions(
        context=lengths.context, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens,
        repetitions=lengths.repetitions, calibrate_tokens=int(search.texts.calibration.size),
        select_tokens=used.get("select", 0), confirm_tokens=used.get("confirm", 0), seed=search.seed,
        threads=search.bench.baseline.threads, accept_estimates=accept_estimates, time_s=search.deadline.limit_s,
        prepare=search.texts.calibration_record.prepare, device=search.bench.device, duty=search.bench.duty,
    )  # fmt: skip
