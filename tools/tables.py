"""The tables of README.md, as Markdown, from data/results/; and what all tables share.

Each public function is one table; tools/readme.py puts it where a page says `table: <its name>`.
"""

import json
import math
import re

from course_lib.environment import REPOSITORY as REPO
from course_lib.environment import RESULTS
from course_lib.evaluation.claims import CLAIMS
from course_lib.evaluation.statistics import Estimate

# One sentence for each notebook.
ABOUT = {
    "00": "What your machine can do, and how to read a notebook.",
    "01": "Turn pictures into noise, and train a UNet to predict it.",
    "02": "Draw with Algorithm 2, DDIM and a second-order solver.",
    "03": "Train with and without labels, and amplify the difference.",
    "04": "Build the autoencoder that turns pictures into latents.",
    "05": "Train a text-to-image model on latents.",
    "06": "Write Stable Diffusion's loop, and match the stock pipeline.",
    "07": "From text to an image embedding, and from it to a picture.",
    "08": "From a picture back to its noise, with and without guidance.",
    "09": "Change one word, and keep the picture's layout.",
    "10": "Any prompt in a given picture's layout; what editing cannot do.",
    "11": "Learn one new word from five pictures.",
    "12": "Train all weights, and keep the class; LoRA.",
    "13": "Train only the keys and values that read text.",
    "14": "Learn or merge two subjects, and draw both.",
    "15": "Learn a face and a style, and put both into one picture.",
    "16": "Compare all methods, and choose one by measurements.",
    "17": "From a phone's folder to a file for A1111, ComfyUI, diffusers.",
}
# Some keys of a claim's values in clearer words.
WORDS = {
    "with lambda = 1 class drift is lower by": "drift lower by",
    "self-attention": "log lead over self-attention",
    "rest": "log lead over the rest",
    "fidelity": "likeness above half of the truth's",
    "joint, text": "joint minus DreamBooth, CLIP-T",
    "merged, text": "merged minus DreamBooth, CLIP-T",
    "riso": "riso beyond half of the way",
    "gain": "fidelity gap",
    "gap": "told, word minus latent",
    "kept": "share kept above the middle",
    "null-text + Prompt-to-Prompt, obeyed": "obeyed, null-text minus prompting again, margin 0.1 added",
    "Plug-and-Play, obeyed": "obeyed, Plug-and-Play minus prompting again, margin 0.1 added",
    "Prompt-to-Prompt, scene": "new scene read off edits, less the picture",
    "keeps": "structure kept, editing minus LoRA",
    "frozen": "layouts of a latent minus of a word",
}


def read(name: str) -> dict:
    """A record of data/results/."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(*rows: tuple) -> str:
    """Rows of cells as a Markdown table; the first is its head."""
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *body]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def notebooks() -> str:
    """What each notebook is about, and the time and memory of the run that wrote its outputs."""
    run = read("course_cpu.json")
    rows = [("notebook", "what you do", "minutes", "memory")]
    for row in run["notebooks"]:
        number, link = row["notebook"][:2], f"notebooks/{row['notebook']}"
        if number not in ABOUT:
            raise SystemExit(f"tools/tables.py: ABOUT has no sentence for {link}; add one")
        minutes, memory = f"{row['seconds'] / 60:.1f}", f"{row['peak_mib'] / 1024:.1f} GiB"
        rows.append((f"[{number}]({link})", ABOUT[number], minutes, memory))
    days = sorted({row["date"] for row in run["notebooks"]})
    return table(*rows) + f"\n\n`make notebooks PROFILE=cpu` on {run['device']}, {' and '.join(days)}."


def verdicts() -> str:
    """All claims of the seminar in few words, each with its verdict and the number that decides it."""
    judged, rows = read("claims.json")["claims"], [("claim", "verdict", "number")]
    for name, one in CLAIMS.items():
        claim = judged.get(name, {"verdict": "not yet measured", "values": {}})
        where = f"notebooks/{claim.get('notebook')}.ipynb"
        label = f"[{name}]({where})" if (REPO / where).is_file() else name
        rows.append((f"{label} {one['short']}", claim["verdict"], number(claim)))
    return table(*rows)


def number(claim: dict) -> str:
    """The number that decides a verdict: the first estimate that does not speak for the claim, else the first one."""
    values = claim["values"]
    if claim["verdict"] == "not testable here":
        premise = re.search(r"(\d+%)[^%]*?(\d+%) needed", claim["measured"])
        return f"premise {premise[1]}, {premise[2]} needed" if premise else ""
    if "moved" in values:
        return f"{len(values['moved'])} other tensors moved"
    if "residual" in values:
        return f"residual {values['residual']:.0e}"
    estimates = {key: one for key, one in values.items() if isinstance(one, dict) and "low" in one}
    found = {key: estimate(one) for key, one in estimates.items() if "bootstrap" not in key}
    if not found:
        return ""
    against = {"does not hold": lambda one: one.high < 0, "cannot tell": lambda one: one.low <= 0 <= one.high}
    test = against.get(claim["verdict"], lambda one: True)
    key = next((key for key, one in found.items() if test(one)), next(iter(found)))
    return f"{WORDS.get(key, key.split(',')[0])} {found[key]:+.3f}"


def estimate(found: dict) -> Estimate:
    """An estimate as records hold it: rounded to 4 decimals, None for an infinite end."""
    if found["low"] is None or found["high"] is None:
        return Estimate(found["value"], -math.inf, math.inf, found["n"])
    middle, half = (found["low"] + found["high"]) / 2, (found["high"] - found["low"]) / 2
    if abs(found["value"] - middle) < 2e-4:  # symmetric, but for the rounding
        return Estimate(middle, middle - half, middle + half, found["n"])
    return Estimate(found["value"], found["low"], found["high"], found["n"])
