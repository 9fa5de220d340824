"""Cleans a notebook's outputs of all that describes only the machine that made them."""

import re

MACHINE_PATHS = r"(?<![\w.])(/home/|/Users/|/root/|[A-Z]:\\|\S*ipykernel_\d+)"


def leaked_paths(nb, own=()):
    """(cell number, text) for each output that shows a path of the machine it ran on; `own` adds known folders."""
    known = [rf"(?<![\w.]){re.escape(folder)}(?![\w-])" for folder in own if len(folder) > 1]
    pattern = re.compile("|".join([MACHINE_PATHS, *known]))
    for number, cell in enumerate(nb.cells, 1):
        for out in cell.get("outputs", []):
            data = [value for kind, value in out.get("data", {}).items() if not kind.startswith("image/")]
            text = "\n".join(map(str, [out.get("text", ""), *out.get("traceback", []), *data]))
            if found := pattern.search(text):
                yield number, text[found.start() : found.start() + 80].split("\n")[0]


def last_state(text):
    """The text that a terminal shows in the end: of each line, the part after its last carriage return."""
    lines = text.replace("\x1b[A", "").split("\n")
    return "\n".join(([part for part in line.split("\r") if part.strip()] or [""])[-1] for line in lines)


def tidy(nb):
    """Drops all that differs between machines and runs and is of no use to a reader; changes `nb` in place."""
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.get("language_info", {}).pop("version", None)
    nb.metadata.pop("widgets", None)  # controls without a kernel do nothing: the picture beside them is kept
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        streams, kept = {}, []
        # A bar arrives in pieces, between prints too: one stream each is joined before looking for its last state.
        for out in cell.get("outputs", []):
            control = out.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if control and "image/png" not in out.data:  # a progress bar: nothing is left of it
                continue
            if out.get("name") in streams:
                streams[out.name].text += out.text
                continue
            kept.append(out)
            if out.output_type == "stream":
                streams[out.name] = out
            else:
                streams.pop("stdout", None)  # prints stay on their side of a picture
        for out in [out for out in kept if out.output_type == "stream"]:
            out.text = last_state(out.text)
        if "outputs" in cell:
            cell.outputs = [out for out in kept if out.get("text", "-").strip()]
