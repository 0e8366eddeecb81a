"""``tune``: quantize a model so that it meets an accuracy target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slim_core.errors import InvalidValueError
from slim_core.files import PathLike, as_path, check_apart, check_output_dir
from slim_core.logging import get_logger
from slim_core.recipe import Recipe
from slim_core.scheme import QuantScheme
from slim_core.validate import check_choice, check_int
from slim_ptq.analysis import Metric, analyze
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.devices import torch_device
from slim_ptq.precision import PERPLEXITY, TaskData
from slim_ptq.prepare import Prepared, prepare
from slim_ptq.tuning.candidates import Candidates
from slim_ptq.tuning.search import smallest_prefix, spare
from slim_ptq.tuning.target import Target
from slim_ptq.tuning.trials import TrialCache, Tuned

_log = get_logger("ptq")


def tune(
    model: PathLike,
    output: PathLike,
    *,
    target: str | Target,
    calibration: PathLike | Iterable[str] | TokenWindows,
    data: PathLike,
    task: str = PERPLEXITY,
    shot: int = 5,
    questions: int | None = None,
    metric: str | None = None,
    fallback: str = "float",
    prune: bool = False,
    scheme: str | None = None,
    recipe: Recipe | PathLike | None = None,
    method: str | None = None,
    format: str | None = None,
    samples: int = 32,
    length: int = 512,
    batch: int = 4,
    device: str = "cpu",
    cache: PathLike | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Tuned:
    """Quantize a model with as few layers left in floating point as a target allows.

    Layers that engines run as one matrix are ranked together by their sensitivity.  Bisection finds
    how many groups from the top of the ranking must fall back; every candidate is quantized and
    measured as it would be deployed.

    Parameters
    ----------
    model, output : path
    target : str or Target
        ``ppl+1%``, ``ppl<=24.5``, ``accuracy-0.5%`` ... (:meth:`Target.parse`).
    calibration : path, texts or TokenWindows
        As for :func:`slim_ptq.quantize`; also what layers are ranked on.
    data : path
        What the target is measured on: a text, or the data of ``task``.
    task, shot, questions
        As ``dataset``, ``shot`` and ``samples`` of :class:`slim_ptq.PrecisionTest`.
    metric : str, optional
        How layers are ranked (:func:`slim_ptq.analyze`): by ``model_error`` if not given, or by
        ``layer_error`` if the recipe smooths or rotates, which join layers.
    fallback : str
        Scheme of the layers that fall back: ``float``, or such as ``w8a16``.
    prune : bool
        Afterwards try to quantize each of the layers that fell back, one by one.
    scheme, recipe, method, format, samples, length, batch, device, overwrite, trust_remote_code
        As for :func:`slim_ptq.quantize`.
    cache : path, optional
        File with the values of candidates, ``<output>.tune.json`` if not given.  A search that was
        interrupted goes on where it was if nothing else has changed.

    Returns
    -------
    Tuned

    Raises
    ------
    InvalidValueError
        Also if the target cannot be met.
    SlimError
        See :mod:`slim_core.errors`; everything that can be known beforehand is raised beforehand.
    """
    goal = target if isinstance(target, Target) else Target.parse(target)
    place = check_output_dir(as_path("output", output), overwrite=overwrite)
    check_apart("model", model, place)
    torch_device(device)
    if metric is not None:
        check_choice("metric", metric, [known.value for known in Metric])
    tasks = TaskData(task, data, shot=shot, samples=questions)
    if tasks.metric != goal.metric:
        raise InvalidValueError(
            f"the target is one of {goal.metric}, and the task {task!r} gives {tasks.metric}"
        )
    job = prepare(
        model,
        scheme=scheme,
        recipe=recipe,
        method=method,
        format=format,
        calibration=calibration,
        samples=samples,
        length=length,
        batch=check_int("batch", batch, low=1),
        trust_remote_code=trust_remote_code,
    )
    if job.data is None:
        raise InvalidValueError("layers are ranked on calibration data, and there is none")
    if job.recipe.fallback:
        raise InvalidValueError("tune chooses the layers that fall back; leave fallback at 0")
    if metric is None:
        joined = job.recipe.smooth is not None or job.recipe.rotate is not None
        metric = (Metric.LAYER_ERROR if joined else Metric.MODEL_ERROR).value
    final = place.resolve()
    candidates = Candidates(
        job=job,
        data=job.data,
        tasks=tasks,
        source=as_path("data", data),
        fallback=QuantScheme.parse(fallback),
        scratch=final.parent,
        device=device,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    known = final.with_name(f"{final.name}.tune.json") if cache is None else as_path("cache", cache)
    trials = TrialCache(known, candidates.fingerprint(metric))
    if trials.ranking is None:
        trials.ranking = _rank(job, metric, device, trust_remote_code)
    search = _Search(candidates, trials, goal)
    groups = search.smallest(prune=prune)
    layers = search.layers(groups)
    text = candidates.source if goal.metric == PERPLEXITY else None  # for the report
    candidates.write(layers, place, text=text, overwrite=overwrite)
    return Tuned(
        target=goal,
        metric=metric,
        bound=goal.bound(search.reference),
        reference=search.reference,
        value=search.value(groups),
        groups=tuple(groups),
        count=len(search.ranking),
        layers=tuple(layers),
        trials=trials.trials(),
        recipe=candidates.recipe(layers),
    )


def _rank(job: Prepared, metric: str, device: str, trust_remote_code: bool) -> dict[str, list[str]]:
    """Return the layers by group, the most sensitive group first."""
    if job.data is None:
        raise InvalidValueError("layers are ranked on calibration data, and there is none")
    found = analyze(
        job.checkpoint.path,
        calibration=job.data,
        metric=metric,
        recipe=job.recipe,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return {item.group: list(item.layers) for item in found.groups}


class _Search:
    """A ranking, and the values of its candidates, each found once."""

    def __init__(self, candidates: Candidates, trials: TrialCache, goal: Target) -> None:
        self._candidates = candidates
        self._trials = trials
        self._goal = goal
        self.ranking = trials.ranking or {}
        self.reference: float = trials.reference or candidates.measure_float()
        trials.reference = self.reference
        if not goal.met(self.reference, self.reference):
            raise InvalidValueError(
                f"the float model itself does not meet {goal}: its {goal.metric} is "
                f"{self.reference:.6g}"
            )

    def layers(self, groups: Sequence[str]) -> list[str]:
        """Return the layers of groups."""
        return [name for group in groups for name in self.ranking[group]]

    def value(self, groups: Sequence[str]) -> float:
        """Return the value of the model with these groups falling back."""
        known = self._trials.find(groups)
        if known is None:
            known = self._candidates.measure(self.layers(groups))
            self._trials.add(groups, known)
            _log.info("%d of %d groups fall back: %.6g", len(groups), len(self.ranking), known)
        return known

    def smallest(self, *, prune: bool) -> list[str]:
        """Return the groups that must fall back."""
        order = list(self.ranking)
        if not self._candidates.fallback.is_float and not self._meets(order):
            raise InvalidValueError(
                f"{self._goal} is not met even with every layer in {self._candidates.fallback}"
            )
        count = smallest_prefix(len(order), lambda k: self._meets(order[:k]))
        if count == len(order) and self._candidates.fallback.is_float:
            raise InvalidValueError(
                f"{self._goal} is met by the float model alone",
                hint="use a scheme that loses less, another method, or outlier suppression",
            )
        chosen = order[:count]
        return spare(chosen, self._meets) if prune else chosen

    def _meets(self, groups: Sequence[str]) -> bool:
        return self._goal.met(self.value(groups), self.reference)
