"""Records the installed trainer's source at every place that an adapter patches.

`python tests/scripts/known_sources.py ADAPTER [--tested]`, with the Python of an environment that
has the trainer, adds the contents to ppo_fast/integrations/known/ADAPTER.json. `--tested` lists
the version among those that the adapter's tests passed with; without it, what differs from every
tested version is not added, because nobody has seen that it means the same.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppo_fast.integrations._known import FOLDER, Known, Seen, load, ordered, span
from ppo_fast.integrations._patch import Integration

TESTS = Path(__file__).resolve().parent.parent / "integrations"


def recorded(integration: Integration, known: Known, tested: bool) -> Known:
    """`known` with the installed version's contents in the place of those that it had of it."""
    version = importlib.metadata.version(integration.package)
    versions = tuple(ordered([*known.tested, version])) if tested else known.tested
    places = {
        place: [replace(s, versions=tuple(v for v in s.versions if v != version)) for s in seen]
        for place, seen in known.places.items()
    }
    for one in integration.present(integration.ops):
        seen = places.setdefault(one.swap.key, [])
        for i, other in enumerate(seen):
            if other.content == one.content:
                seen[i] = Seen(one.content, tuple(ordered([*other.versions, version])))
                break
        else:
            seen.append(Seen(one.content, (version,)))
    kept = {p: tuple(s for s in seen if {*s.versions} & {*versions}) for p, seen in places.items()}
    return Known(versions, {place: seen for place, seen in kept.items() if seen})


def text(known: Known) -> str:
    """The file's text: a line for each field."""
    places: dict[str, Any] = {
        place: [
            {
                "versions": " ".join(s.versions),
                "takes": " ".join(s.content.takes),
                "gives": " ".join(s.content.gives),
                "statements": " ".join(s.content.statements),
            }
            for s in sorted(seen, key=lambda s: ordered(s.versions)[0])
        ]
        for place, seen in sorted(known.places.items())
    }
    return json.dumps({"tested": " ".join(known.tested), "places": places}, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter")
    parser.add_argument("--tested", action="store_true", help="its tests passed with this version")
    given = parser.parse_args()
    stand_ins = f"{given.adapter}_imports"  # for what the trainer imports and needs a GPU
    if (TESTS / f"{stand_ins}.py").exists():
        sys.path.insert(0, str(TESTS))
        importlib.import_module(stand_ins)
    integration = importlib.import_module(f"ppo_fast.integrations.{given.adapter}").integration
    known = recorded(integration, load(given.adapter), given.tested)
    (FOLDER / f"{given.adapter}.json").write_text(text(known), "utf-8")
    for place, seen in known.places.items():
        print(f"{place}: {', '.join(span(s.versions) for s in seen)}")
    print(f"tested: {', '.join(known.tested)}")


if __name__ == "__main__":
    main()
