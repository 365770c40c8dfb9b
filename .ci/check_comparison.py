"""Checks that a short comparison really compared: `check_comparison.py FOLDER`."""

import html
import json
import math
import re
import sys
from pathlib import Path

folder = Path(sys.argv[1])
results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
page = (folder / "report.html").read_text(encoding="utf-8")

assert results["status"] == "complete", results["status"]
assert len(results["runs"]) == 4, len(results["runs"])
for run in results["runs"]:
    assert run["status"] == "finished", run
    losses = run["curve"]["loss"]
    assert losses[-1] < losses[0] < math.log(256) + 0.5, losses  # learned, from about chance
names = [entry["name"] for entry in results["entries"]]
assert names == ["gradient_descent", "triple_momentum"], names
difference = results["entries"][1]["difference"]
assert difference["low"] < difference["mean"] < difference["high"], difference
text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())
assert results["verdict"]["sentence"] in text, "the page states the verdict"
assert "<svg" in page
print(f"comparison checked: {results['verdict']['sentence']}")
