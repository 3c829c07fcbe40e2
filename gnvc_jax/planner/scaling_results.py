"""Folder of a scaling experiment: points that are kept between calls, table and plot."""

import json
from pathlib import Path

import jax

from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json, write_whole
from gnvc_jax.planner import scaling_report


class Results:
    """Points of one experiment, in `scaling.json` of a folder.

    The first process of a run of several writes; all of them see the same points.

    Args:
        folder: Folder, which is made if need be.
        facts: Everything that all points have in common.

    Raises:
        UsageError: If the folder has points of another experiment, or its file is damaged.
    """

    def __init__(self, folder: Path, facts: dict):
        self.folder, self.facts = folder, facts
        self.path, self.points = folder / "scaling.json", {}
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        try:
            kept = json.loads(self.path.read_text())
            self.points = {point["chips"]: point for point in kept["points"]}
            same = kept["facts"] == facts
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path}: damaged ({error}), remove it") from None
        if not same:
            raise UsageError(
                f"{self.path}: holds points of {kept['facts']}, expected {facts}; "
                "choose another --out"
            )

    def has(self, chips: int, measured: bool) -> bool:
        """Whether there is a point of so many chips, a measured one if that is wanted."""
        return chips in self.points and (not measured or "measured" in self.points[chips])

    def add(self, point: dict) -> None:
        """Adds a point, in place of one of as many chips, and writes the file."""
        self.points[point["chips"]] = point
        if jax.process_index() == 0:
            write_json(self.path, {"facts": self.facts, "points": self.sorted()})

    def sorted(self) -> list[dict]:
        """All points by rising number of chips."""
        return [self.points[chips] for chips in sorted(self.points)]

    @property
    def fit_into_memory(self) -> bool:
        """Whether all plans fit into the memory of the chip."""
        return all(point["plan"]["fits"] for point in self.points.values())

    def report(self) -> str:
        """Writes table and plot, and returns the table with what was fitted."""
        points, chip = self.sorted(), self.facts["chip"]
        text = scaling_report.table(points, chip)
        text += f"\n\n{scaling_report.efficiency_text(points, chip)}"
        if jax.process_index() == 0:
            write_whole(self.folder / "scaling.md", text + "\n")
            scaling_report.figure(points, chip, self.folder / "scaling.svg")
        return text
