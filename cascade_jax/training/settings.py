"""What a folder of work in progress was started with: it goes on under the same settings or not at all."""

import json
import pathlib
from typing import Any

from cascade_jax import files


def settle(path: pathlib.Path, settings: dict[str, Any], what: str = "a run") -> None:
    """Writes the settings of new work to the JSON file `path`; compares them with those of old work.

    Raises:
      ValueError: as `agree`.
    """
    agree(path, settings, what)
    if not path.exists():
        files.write_json(path, settings)


def agree(path: pathlib.Path, settings: dict[str, Any], what: str = "a run") -> None:
    """Compares settings with those in the JSON file `path`, if it is there.

    Raises:
      ValueError: if the file holds other settings, which the message shows, or is damaged.
    """
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads(json.dumps(settings))
        names = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: choose another folder") from error
    if names:
        changes = "; ".join(f"{name}: {old.get(name)} there, {settings.get(name)} now" for name in names)
        raise ValueError(
            f"{path.parent} holds {what} with other settings ({changes}): keep them or choose another folder"
        )
