"""Checking a job before any work: the recipe, the headers, the data, and the plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.checkpoint import Checkpoint, open_checkpoint
from slim_core.errors import PlanError, RecipeError, StructureError
from slim_core.files import PathLike, as_path
from slim_core.formats import FORMATS
from slim_core.logging import get_logger
from slim_core.plan import Plan, build_plan
from slim_core.recipe import Recipe
from slim_core.validate import check_int
from slim_ptq.calibration.text import TokenWindows, read_calibration, texts_to_calibration
from slim_ptq.inventory import Inventory, inventory_by_names, take_inventory
from slim_ptq.limits import check_tokens, within_positions
from slim_ptq.methods import PtqMethods
from slim_ptq.mixing import CalibrationData as Mixture
from slim_ptq.pipeline.attention import attention_of
from slim_ptq.pipeline.smoothing import excluded_layers

_log = get_logger("ptq")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job of which everything has been checked and nothing done."""

    checkpoint: Checkpoint
    inventory: Inventory
    recipe: Recipe
    plan: Plan
    data: TokenWindows | None

    @property
    def blockwise(self) -> bool:
        """Whether the model has to run."""
        recipe = self.recipe
        return (
            self.plan.needs_calibration
            or bool(recipe.fallback)
            or any(part is not None for part in (recipe.smooth, recipe.kv_cache, recipe.attention))
        )


def prepare(
    model: PathLike,
    *,
    scheme: str | None = None,
    recipe: Recipe | PathLike | None = None,
    method: str | None = None,
    smooth: str | None = None,
    format: str | None = None,
    calibration: PathLike | Iterable[str] | TokenWindows | None = None,
    samples: int = 32,
    length: int = 512,
    batch: int = 4,
    plan_only: bool = False,
    trust_remote_code: bool = False,
) -> Prepared:
    """Check everything about a job, from headers alone, and plan it.

    Parameters are those of :func:`slim_ptq.api.quantize`; ``plan_only`` goes on without the
    calibration data that the job would need.

    Raises
    ------
    SlimError
        Whatever is wrong; a :class:`~slim_core.errors.PlanError` lists all problems of the layers.
    """
    directory = as_path("model", model)
    resolved = _resolve_recipe(recipe, scheme=scheme, method=method, smooth=smooth, format=format)
    checkpoint = open_checkpoint(directory)
    try:
        inventory = take_inventory(checkpoint, trust_remote_code=trust_remote_code)
    except StructureError as error:
        if resolved.scheme.is_static or resolved.fallback or resolved.smooth is not None:
            raise
        inventory = inventory_by_names(checkpoint)
        _log.warning("linear layers are found by their names: %s", error.message)
    data = _calibration(
        calibration,
        directory,
        samples=check_int("samples", samples, low=1),
        length=within_positions(check_int("length", length, low=1), checkpoint.config),
        batch=check_int("batch", batch, low=1),
    )
    if data is not None:
        check_tokens(data, checkpoint.config)
    plan = build_plan(
        inventory.linears,
        resolved,
        FORMATS[resolved.format],
        model_dtype=inventory.model_dtype,
        bytes_before=checkpoint.nbytes,
        calibrated=data is not None or plan_only,
        methods=PtqMethods(),
    )
    if resolved.smooth is not None:
        excluded_layers(resolved.smooth, plan)
    job = Prepared(checkpoint, inventory, resolved, plan, data)
    if job.blockwise and data is None and not plan_only:
        raise PlanError(["fallback and smoothing need calibration data, and there is none"])
    if job.blockwise and inventory.model is None:
        raise PlanError(["the model has to run, and transformers does not know it"])
    attention_of(resolved, inventory)  # attention that cannot be reached is said before any work
    return job


def _resolve_recipe(
    recipe: Recipe | PathLike | None, *, scheme: str | None, **values: str | None
) -> Recipe:
    values = {"scheme": scheme, **values}
    given = {key: value for key, value in values.items() if value is not None}
    if recipe is None:
        return Recipe.build(**given)
    if scheme is not None:
        raise RecipeError("give either a scheme or a recipe, not both")
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return Recipe.build(**{**dict(resolved), **given}) if given else resolved


def _calibration(
    source: Any, directory: Path, *, samples: int, length: int, batch: int
) -> TokenWindows | None:
    if source is None or isinstance(source, TokenWindows):
        return source
    if isinstance(source, Mixture):
        source = [sample["prompt"] for sample in source.process()]
    if isinstance(source, (str, Path)):
        return read_calibration(source, directory, samples=samples, length=length, batch=batch)
    return texts_to_calibration(source, directory, samples=samples, length=length, batch=batch)
