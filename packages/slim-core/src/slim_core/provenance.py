"""What a result was made with: versions, platform and fingerprints, nothing about the user."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from slim_core.errors import InvalidTypeError


def fingerprint(value: Mapping[str, Any] | bytes) -> str:
    """Return the SHA-256 of bytes, or of a mapping in canonical JSON, in hexadecimal.

    Raises
    ------
    InvalidTypeError
        A value in the mapping is none of JSON's.
    """
    if not isinstance(value, bytes):
        try:
            text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(f"only JSON values have a fingerprint: {error}") from error
        value = text.encode()
    return hashlib.sha256(value).hexdigest()


def provenance(
    packages: Sequence[str] = (),
    *,
    recipe: Mapping[str, Any] | bytes | None = None,
    config: Mapping[str, Any] | bytes | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Describe the run for a report.

    Parameters
    ----------
    packages : sequence of str
        Distributions, in addition to slim-core and numpy; those not installed are left out.
    recipe, config : mapping or bytes, optional
        The recipe and the model configuration; only their fingerprints are kept, so no path or
        name in them gets into the result.
    seed : int, optional

    Returns
    -------
    dict
        JSON values under ``packages``, ``python``, ``platform``, and ``recipe_sha256``,
        ``config_sha256``, ``seed`` as far as given.  The same run on the same kind of machine gives
        the same dictionary: it has no time, host, user or path.
    """
    versions = {}
    for name in dict.fromkeys(["slim-core", "numpy", *packages]):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    result: dict[str, Any] = {
        "packages": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if recipe is not None:
        result["recipe_sha256"] = fingerprint(recipe)
    if config is not None:
        result["config_sha256"] = fingerprint(config)
    if seed is not None:
        result["seed"] = seed
    return result
