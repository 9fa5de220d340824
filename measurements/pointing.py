"""Where does each word's attention lie? Writes data/results/pointing.json.

    python measurements/pointing.py

On 200 held-out renderings (one object with pattern and accessory, no person, plain style), noised to each time: the
area under the ROC curve of a word's cross-attention map against the true mask of what it names, by the side of the
layers, for the relative map ("area"), for the same and the mask of the next rendering ("shuffled"), and for the plain
map ("plain"). At t = 300 also for the plain map and the mask of the next rendering ("plain shuffled"), and for the
relative maps of the other words of the prompt and the same mask: their mean ("other words"), the largest ("best other
word"), and how often the word is above all of them ("first").
Also how the attention is divided among the start token, the words and the end tokens.
Then: which rows of the text features carry the colour? Pictures are drawn with some rows taken from the same prompt
with another colour, and the judge names the colour.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import records
import torch
from torch import Tensor

from course_lib.environment import CHECKPOINTS, RESULTS, device
from course_lib.evaluation import judge, pointing, statistics
from course_lib.latent import stable_diffusion, text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.toybox import sets
from course_lib.toybox.captions import describe
from course_lib.toybox.pen import COLOURS
from course_lib.toybox.people import PEOPLE
from course_lib.toybox.world import Spec

TIMES = (100, 300, 500, 700, 900)
SIDES = (4, 8, 16)
MORE_AT = 300  # the time of the tables: there the other nulls, too


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "toybox-sd")
    parser.add_argument("--out", type=Path, default=RESULTS / "pointing.json")
    parser.add_argument("--renderings", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=80, help="for the question about the rows")
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=0)
    records.add_options(parser)
    return parser.parse_args()


def alone(count: int) -> list[Spec]:
    """The first held-out specs of one object that is no person, in the plain style, with a pattern and an accessory."""
    found, k = [], 0
    while len(found) < count:
        spec, _ = sets.pair_spec(k, "test")
        k += 1
        if spec.relation is None and spec.style == "plain" and spec.noun not in PEOPLE:
            if spec.accessory and spec.pattern != "plain":
                found.append(spec)
    return found


def areas(sd: StableDiffusion, specs: list[Spec], t: int, seed: int) -> dict:
    """For each side and kind of word the mean areas over renderings, and how the attention is divided."""
    masks = [pointing.masks(spec) for spec in specs]
    parts = [pointing.noised_maps(sd, specs[k : k + 50], t, SIDES, seed + k) for k in range(0, len(specs), 50)]
    row = {}
    for side in SIDES:
        maps = torch.cat([part[side] for part in parts]).cpu()
        row[str(side)] = {"attention": shares(maps, sd.tokenizer, specs)}
        relative, plain = ([pointing.kind_maps(m, sd.tokenizer, spec, how) for m, spec in zip(maps, specs, strict=True)]
                           for how in (True, False))  # fmt: skip
        shuffled = [*masks[1:], masks[0]]
        sources = {"area": (relative, masks), "shuffled": (relative, shuffled), "plain": (plain, masks)}
        if t == MORE_AT:
            sources["plain shuffled"] = (plain, shuffled)
            others = [pointing.other_areas(m, sd.tokenizer, spec) for m, spec in zip(maps, specs, strict=True)]
        for kind in pointing.KINDS:
            found = {name: torch.tensor([pointing.area(m[kind], mask[kind]) for m, mask in zip(*source)])
                     for name, source in sources.items()}  # fmt: skip
            if t == MORE_AT:
                found["other words"] = torch.tensor([np.mean(of_words[kind]) for of_words in others])
                found["best other word"] = torch.tensor([max(of_words[kind]) for of_words in others])
            row[str(side)][kind] = {name: statistics.mean(values).as_dict() for name, values in found.items()}
            if t == MORE_AT:
                first = found["area"] > found["best other word"]
                row[str(side)][kind]["first"] = statistics.share(first).as_dict()
    return row


def shares(maps: Tensor, tokenizer, specs: list[Spec]) -> dict[str, float]:
    """How the attention is divided, on average: the start token, each kind of word, other words, the end tokens."""
    mean, rows = maps.mean(dim=(2, 3)), []
    for of_token, spec in zip(mean, specs, strict=True):
        end = text.words(tokenizer, describe(spec))[-1][1][-1] + 1
        row = {kind: of_token[at].sum() for kind, at in pointing.places(tokenizer, spec).items()}
        row["other words"] = of_token[1:end].sum() - sum(row.values())
        rows.append(row | {"start": of_token[0], "end": of_token[end:].sum()})
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def colour_rows(sd: StableDiffusion, specs: list[Spec], steps: int, seed: int) -> dict:
    """Which colour the judge names when some rows of the features come from the same prompt with another colour."""
    rng = np.random.default_rng(seed)
    colours = [colour for colour in COLOURS if colour != "orange"]  # "an orange": another word before it
    plain = dict(pattern="plain", accessory=None, accessory_colour=None)
    pairs = [rng.permutation(colours)[:2].tolist() for _ in specs]
    one, other = ([replace(spec, **plain, colour=pair[k]) for spec, pair in zip(specs, pairs)] for k in (0, 1))
    features, swapped = (sd.encode_prompt([describe(spec) for spec in side]) for side in (one, other))
    at = [pointing.places(sd.tokenizer, spec) for spec in one]
    noise, reader = sd.noise(len(specs), seed=seed), judge.load_judge(sd.device)
    index = torch.arange(features.shape[1])
    found = {}
    for name in ("none", "colour", "noun", "after", "noun, after"):
        mixed = features.clone()
        for k, place in enumerate(at):
            noun = place["noun"][-1]
            rows = {"none": index < 0, "colour": (index >= place["colour"][0]) & (index <= place["colour"][-1]),
                    "noun": (index >= place["noun"][0]) & (index <= noun), "after": index > noun}  # fmt: skip
            rows["noun, after"] = rows["noun"] | rows["after"]
            mixed[k, rows[name]] = swapped[k, rows[name]]
        images = sd.sample(mixed, w=3.0, steps=steps, x_T=noise)
        named = judge.answers(reader, images)[0]["colour"].argmax(1)
        found[name] = {
            which: statistics.share(named == torch.tensor([judge.ATTRIBUTES["colour"].index(s.colour) for s in side]))
            .as_dict() for which, side in (("own", one), ("other", other))
        }  # fmt: skip
        print(f"rows of the other prompt: {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    args = arguments()
    sd = stable_diffusion.load(args.model, device(), records.prepare(args))
    specs = alone(args.renderings)
    setting = dict(renderings=args.renderings, prompts=args.prompts, steps=args.steps, seed=args.seed,
                   made_by="measurements/pointing.py")  # fmt: skip
    record = records.start(args.out, setting | records.setting_of_model(sd), "t", fresh=args.fresh)
    for t in TIMES:
        if str(t) not in record["t"]:
            record["t"][str(t)] = areas(sd, specs, t, args.seed)
            records.write(args.out, record)
            print(t, {side: {kind: row[kind]["area"]["value"] for kind in pointing.KINDS}
                      for side, row in record["t"][str(t)].items()}, flush=True)  # fmt: skip
    if "colour rows" not in record:
        record["colour rows"] = colour_rows(sd, specs[: args.prompts], args.steps, args.seed)
        records.write(args.out, record)


if __name__ == "__main__":
    main()
