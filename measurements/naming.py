"""Can the subjects be told apart by eye? Shuffled samples of each method, to be matched to the subjects.

    python measurements/naming.py                           writes build/naming/<method>.png: 40 numbered samples each
    python measurements/naming.py --method lora --answers "tilly mochi ..."    compares, writes named_samples.json

The samples are tiles of data/results/personalization_tiles.png, drawn at random from all subjects, scenes and training
seeds; the sheets say nothing of what they show. The six subjects have six nouns, so the right kind of thing alone does
not count: a name is given only if at least two details of the individual are seen (its two tones, its emblem, what it
wears), else "?".
"""

import argparse
import datetime
import json
from pathlib import Path

import numpy as np
import records
import torch
from methods import NEW, ON_SHEET, SUBJECTS
from PIL import Image

from course_lib.environment import RESULTS
from course_lib.plots import grid

COUNT, COLUMNS = 40, 10


def samples(method: str, count: int = COUNT) -> tuple[np.ndarray, list[str]]:
    """(count, 64, 64, 3) shuffled samples of a method, and the subject of each."""
    rows = json.loads((RESULTS / "personalization.json").read_text(encoding="utf-8"))["tiles"]
    sheet = np.array(Image.open(RESULTS / "personalization_tiles.png"))
    found = []
    for k, row in enumerate(rows):
        name, one, _ = row.split()
        if one == method:
            strip = sheet[k * 64 : (k + 1) * 64]
            found += [(strip[:, j * 64 : (j + 1) * 64], name) for j in range(NEW)]
    order = np.random.default_rng([list(ON_SHEET).index(method), 40]).permutation(len(found))[:count]
    return np.stack([found[k][0] for k in order]), [found[k][1] for k in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[method for method in ON_SHEET if method != "base"])
    parser.add_argument("--answers", help=f"{COUNT} names of {', '.join(SUBJECTS)}, or ?")
    parser.add_argument("--sheets", type=Path, default=Path("build/naming"), help="folder of the sheets")
    parser.add_argument("--out", type=Path, default=RESULTS / "named_samples.json")
    args = parser.parse_args()
    if not args.answers:
        args.sheets.mkdir(parents=True, exist_ok=True)
        for method in [args.method] if args.method else [method for method in ON_SHEET if method != "base"]:
            tiles = torch.from_numpy(samples(method)[0]).permute(0, 3, 1, 2)
            labels = [str(k + 1) for k in range(0, COUNT, COLUMNS)]
            fig = grid(tiles, COLUMNS, "", labels, [str(k) for k in range(COLUMNS)], tile=1.2)
            fig.savefig(args.sheets / f"{method}.png", dpi=100, bbox_inches="tight")
        return
    named, truth = args.answers.split(), samples(args.method)[1]
    if len(named) != len(truth) or not set(named) <= {*SUBJECTS, "?"}:
        parser.error(
            f"--answers: expected {len(truth)} of {', '.join(SUBJECTS)} or ?, got {len(named)}: {args.answers}"
        )
    record = records.read(args.out, {}, "rows")
    right = sum(one == other for one, other in zip(named, truth, strict=True))
    record["rows"][args.method] = dict(right=right, of=len(truth), named=named, truth=truth)
    record.update(made_by="measurements/naming.py", date=datetime.date.today().isoformat())
    records.write(args.out, record)
    print(f"{args.method}: {right} of {len(truth)}")


if __name__ == "__main__":
    main()
