"""Claims: verdicts follow from differences and intervals, and what the record says is what is printed."""

import json
from pathlib import Path

import claims as toybox_claims
import nbformat
import plateau as toybox_plateau
import pytest
import torch

from course_lib.evaluation import claims
from course_lib.evaluation.metrics import interval

REPO = Path(__file__).resolve().parents[1]

KEYS = ("fidelity", "drift", "spread", "diversity", "others")
LEVELS = {  # fidelity, drift, spread, diversity, others of an invented world in which all claims hold
    "base": (0.1, 0.1, 1.0, 1.0, 0.0), "textual_inversion": (0.3, 0.1, 1.0, 0.8, 0.0),
    "dreambooth": (0.6, 0.2, 0.9, 0.6, 0.3), "dreambooth_no_prior": (0.7, 0.5, 0.5, 0.5, 0.8),
    "dreambooth_prior_0.3": (0.65, 0.3, 0.8, 0.6, 0.4), "dreambooth_prior_3": (0.5, 0.15, 0.95, 0.6, 0.2),
    "lora": (0.5, 0.3, 0.8, 0.6, 0.4), "custom_diffusion": (0.58, 0.15, 0.95, 0.6, 0.2),
}  # fmt: skip


def world(**other):
    """A record of step 1 with these levels and a little noise."""
    generator, rows = torch.Generator().manual_seed(0), {}
    for subject in toybox_claims.SUBJECTS:
        rows[subject] = {}
        for method, levels in (LEVELS | other).items():
            noise = 0.02 * torch.randn(len(KEYS), 20, generator=generator)
            by_prompt = {key: (level + n).tolist() for key, level, n in zip(KEYS, levels, noise, strict=True)}
            sizes = dict(bytes=4000, parameters=1000 if method != "custom_diffusion" else 30)
            rows[subject][method] = dict(by_prompt=by_prompt, **sizes)
        change = {"cross-attention": (0.3, 0.32, 0.28), "self-attention": (0.1, 0.12), "rest": (0.1, 0.08, 0.09)}
        share = {"cross-attention": 0.05, "self-attention": 0.15, "rest": 0.8}
        rows[subject]["dreambooth_no_prior"]["change"] = {
            kind: dict(by_weight=list(values), share=share[kind]) for kind, values in change.items()
        }
    return toybox_claims.Rows(dict(rows=rows))


@pytest.mark.parametrize("name", ["c10", "c11", "c12", "c13", "c14", "c15"])
def test_in_a_world_where_a_claim_is_true_it_holds(name):
    claim = getattr(toybox_claims, name)(world())
    assert claim["verdict"] == "holds" and claim["measured"] and claim["claim"]


@pytest.mark.parametrize(("name", "other"), [
    ("c10", dict(dreambooth=(0.2, 0.2, 0.9, 0.6, 0.3))),  # below Textual Inversion
    ("c11", dict(dreambooth_no_prior=(0.7, 0.0, 0.5, 0.5, 0.8))),  # drifts away from the subject
    ("c12", dict(dreambooth_no_prior=(0.7, 0.5, 1.3, 1.3, 0.8))),  # more diverse than before
    ("c13", dict(dreambooth=(0.6, 0.7, 0.9, 0.6, 0.3))),  # the prior makes drift worse
    ("c15", dict(custom_diffusion=(0.2, 0.15, 0.95, 0.6, 0.2))),  # far from DreamBooth
])  # fmt: skip
def test_in_a_world_where_a_claim_is_false_it_does_not_hold(name, other):
    assert getattr(toybox_claims, name)(world(**other))["verdict"] == "does not hold"


def test_equal_steps_are_told_from_small_weights():
    """All weights moved by 0.01, those of the convolution are small: it alone has a large relative change."""
    size = {"down.attn2.to_k.weight": 1.0, "down.attn1.to_k.weight": 0.5, "conv.weight": 0.1, "conv.bias": 9.0}
    weights = {name: torch.full((2, 2) if name.endswith("weight") else (2,), v) for name, v in size.items()}
    rows, by_weight = world(), {"cross-attention": [0.01], "self-attention": [0.02], "rest": [0.1]}
    for subject in rows.subjects:
        rows.rows[subject]["dreambooth_no_prior"]["change"] = {k: dict(by_weight=v) for k, v in by_weight.items()}
    found = toybox_claims.moved_alike(rows, weights)
    assert set(found["step"].values()) == {0.01} and found["correlation"] == pytest.approx(1.0, abs=1e-3)
    assert found["size"] == {"cross-attention": 1.0, "self-attention": 0.5, "rest": 0.1}


def test_a_difference_within_its_interval_can_not_be_told():
    values = torch.tensor([0.1, -0.1, 0.12, -0.09])
    found = toybox_claims.difference(values)
    assert found["interval"] == pytest.approx(interval(values), abs=1e-4) and toybox_claims.told(found) == "cannot tell"
    sure = dict(mean=1.0, interval=0.1)
    assert toybox_claims.told(sure, found) == "cannot tell"
    assert toybox_claims.told(sure, dict(mean=-1.0, interval=0.1)) == "does not hold"


def test_two_subjects_are_found_in_either_order():
    """The ground truth beats pictures of the two classes without the subjects, mirrored or not."""
    from course_lib.evaluation.judge import load_judge

    class Stub:
        judge = load_judge()
        args = None

        def individual(self, x):
            with torch.no_grad():
                return self.judge.individual(x)

    two = toybox_claims.TwoSubjects(Stub(), ("mochi", "tilly"))
    truth = two.truth()
    specs = [toybox_claims.subjects.SUBJECTS["mochi"].spec(seed=0, **toybox_claims.pair_fields(scene))
             for scene in toybox_claims.SCENES]  # fmt: skip
    plain = toybox_claims.pixels([toybox_claims.replace(spec, look=None) for spec in specs])
    seen, mirrored, without = (two.score(x, 1) for x in (truth, truth.flip(-1), plain))
    assert seen["worse"].mean() > without["worse"].mean() + 0.2
    assert mirrored["worse"].mean() > without["worse"].mean() + 0.2
    # the judge did not learn from enlarged halves: it misreads 2 of the 12 teapots
    assert seen["nouns"].mean() > 0.75 and mirrored["nouns"].mean() > 0.75
    cats = [toybox_claims.replace(spec, other=toybox_claims.replace(spec.other, noun="cat")) for spec in specs]
    assert two.score(toybox_claims.pixels(cats), 1)["nouns"].mean() == 0  # a cat next to a cat is not the pair


def test_the_pairs_are_those_that_the_untouched_model_draws_whatever_the_methods_do():
    shares = {"a b": (0.4, 0.9), "b a": (0.5, 0.9), "a c": (0.9, 0.5), "b c": (0.3, 1.0), "c d": (0.2, 0.7),
              "d a": (0.1, 0.9)}  # fmt: skip
    rows = {names: dict(untouched=untouched, truth=truth) for names, (untouched, truth) in shares.items()}
    # "a b" is the same pair in its worse order, and the judge cannot read "a c"
    assert toybox_claims.chosen(rows) == [("b", "a"), ("b", "c"), ("c", "d")]


def found(**worse):
    """The scores of two pairs with these levels of `worse`."""
    generator, result = torch.Generator().manual_seed(0), {}
    for names in ("a b", "c d"):
        scores = {label: {key: (level + 0.02 * torch.randn(12, generator=generator)).tolist()
                          for key in ("fidelity", "worse", "nouns")} for label, level in worse.items()}  # fmt: skip
        merge = dict(residual=1e-7, residual_of_average=0.4, gap_to_solver=1e-8, layers=14, condition=1e7, seconds=2.0)
        result[names] = dict(scores=scores, merge=merge)
    return result


WORSE = {"untouched model": 0.2, "ground truth": 0.9, "joint": 0.6, "merged": 0.5, "averaged": 0.4, "dreambooth": 0.3}


def test_claims_on_two_subjects_follow_all_pairs():
    scores = found(**WORSE)
    for rule in (toybox_claims.c16, toybox_claims.c17, toybox_claims.c19):
        claim = rule(scores)
        assert claim["verdict"] == "holds" and "nan" not in claim["measured"]
    assert toybox_claims.c16(scores)["values"]["difference"]["count"] == 24
    assert list(toybox_claims.c16(scores)["values"]["by_pair"]) == ["a b", "c d"]
    worse = found(**WORSE | {"joint": 0.1})
    assert toybox_claims.c16(worse)["verdict"] == toybox_claims.c19(worse)["verdict"] == "does not hold"
    scores["c d"]["merge"]["residual"] = 1e-3  # one pair whose constraint is missed is enough
    assert toybox_claims.c17(scores)["verdict"] == "does not hold"


def test_what_is_printed_is_the_record(tmp_path):
    path = tmp_path / "claims.json"
    claim = dict(claim="A > B", measured="+0.1 ± 0.2", verdict="cannot tell", why="too few")
    path.write_text(json.dumps(dict(seed=0, device="CPU", date="2026-01-01", claims={"C1": claim})))
    said = claims.verdict("C1", path)
    assert "C1, CANNOT TELL: A > B" in said and "+0.1 ± 0.2" in said and "too few" in said and "2026-01-01" in said
    assert "not in the record" in claims.verdict("C2", path)
    assert "not in the record" in claims.verdict("C1", tmp_path / "none.json")


@pytest.mark.skipif(not claims.load()["claims"], reason="data/results/claims.json is not made yet")
def test_the_shipped_record_is_complete():
    record = claims.load()["claims"]
    assert set(record) == {"C8", *(f"C{k}" for k in range(10, 20))}
    for name, claim in record.items():
        assert claim["verdict"] in claims.VERDICTS and claim["measured"], name
        assert (claim["notebook"], claim["section"]) == toybox_claims.PLACES[name]


def test_every_claim_has_its_cell_in_the_notebook_that_the_record_names():
    """Under the heading named, and with `claims.verdict`, so that the notebook prints what README says."""
    for name, (notebook, section) in toybox_claims.PLACES.items():
        cells = nbformat.read(REPO / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
        headings = [line.lstrip("# ") for c in cells if c.cell_type == "markdown" for line in c.source.splitlines()
                    if line.startswith("#")]  # fmt: skip
        assert section in headings, f"{name}: {notebook} has no section {section!r}"
        code = "".join(c.source for c in cells if c.cell_type == "code" and "claims.verdict" in c.source)
        assert f'"{name}"' in code, f"{name}: no cell of {notebook} prints its verdict"


@pytest.mark.parametrize(("last", "reached"), [(0.5, True), (0.52, True), (0.6, False)])
def test_a_plateau_is_where_more_steps_bring_nothing_beyond_the_interval(last, reached):
    generator = torch.Generator().manual_seed(0)
    levels = (0.1, 0.3, 0.4, 0.45, 0.5, last)

    def rows():
        noise = 0.1 * torch.randn(len(levels), 20, generator=generator)
        return [
            dict(step=k, seconds=float(k), fidelity=(level + n).tolist())
            for k, (level, n) in enumerate(zip(levels, noise, strict=True))
        ]

    found = toybox_plateau.summary({"mochi": {"lora": rows()}, "tilly": {"lora": rows()}})
    assert list(found) == ["lora"] and found["lora"]["plateau"] == reached and found["lora"]["later"]["count"] == 40
    assert found["lora"]["fidelity"][0] == pytest.approx(0.1, abs=0.05)
