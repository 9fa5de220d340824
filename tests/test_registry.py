"""Where models come from: names, the cache, a dead id, a mirror, no network; nothing here asks the network."""

import hashlib
from dataclasses import replace

import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from course_lib.latent import registry
from course_lib.latent.registry import MODELS, Entry, ModelUnavailable, fetch, resolve, variant

SD15 = MODELS["sd15"]
PLAIN = ["unet/u.safetensors", "vae/v.safetensors", "text_encoder/t.safetensors"]
HALF = [name.replace(".", ".fp16.") for name in PLAIN]


def gone(kind):
    error = kind.__new__(kind)  # its constructor, which wants an HTTP response, differs between versions
    error.args = ("404 Client Error: a long text with a request id",)
    return error


class Hub:
    """A hub with some repositories: repository -> file names, or the error that its address answers with."""

    def __init__(self, monkeypatch, folder, **repositories):
        self.folder, self.asked = folder, []
        self.answers = {name.replace("__", "/"): answer for name, answer in repositories.items()}
        monkeypatch.setattr(registry, "model_info", self.model_info)
        monkeypatch.setattr(registry, "snapshot_download", self.snapshot_download)

    def model_info(self, repo, revision=None, timeout=None):
        assert timeout <= 10
        self.asked.append((repo, revision))
        answer = self.answers.get(repo, gone(RepositoryNotFoundError))
        if isinstance(answer, Exception):
            raise answer

    def snapshot_download(self, repo, *, revision, local_files_only=False, allow_patterns, ignore_patterns, **options):
        folder = self.folder / repo.replace("/", "--")
        if local_files_only:
            if not folder.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(folder)
        self.patterns = allow_patterns, ignore_patterns
        half = any("fp16" in pattern for pattern in allow_patterns)
        for name in self.answers[repo]:
            if (".fp16" in name) == half:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(name)
        folder.mkdir(exist_ok=True)
        return str(folder)


def model_folder(folder, names=PLAIN):
    for name in [*names, "tokenizer/x", "scheduler/x"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(registry, "snapshot_download", refuse)
    monkeypatch.setattr(registry, "model_info", refuse)


def test_names_folders_and_hub_ids(tmp_path):
    assert resolve("toybox").folder.name == "toybox-sd" and resolve("toybox").repo is None
    assert resolve("sd15") is SD15 and len(SD15.revision) == 40 and all(len(h) == 64 for h in SD15.sha256.values())
    assert SD15.repo not in SD15.mirrors and SD15.licence == "CreativeML Open RAIL-M" and SD15.resolution == 512
    assert resolve(tmp_path).folder == resolve(str(tmp_path)).folder == tmp_path
    assert resolve("owner/model-1.5") == Entry(name="owner/model-1.5", repo="owner/model-1.5")
    for wrong in ("sd14", "a/b/c", tmp_path / "none", "", "owner/"):
        with pytest.raises(ValueError, match=r"^name: expected one of toybox, sd15, a model folder, or a hub id"):
            resolve(wrong)


def test_the_error_for_a_single_file_says_how_to_make_a_folder(tmp_path, no_network):
    (tmp_path / "x.safetensors").touch()
    for name in (tmp_path / "x.safetensors", str(tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match=r"^name: expected a folder .* is a single file; .*from_single_file\("):
            resolve(name)
    for name in ("models/x.safetensors", "x.CKPT"):
        with pytest.raises(ValueError, match=rf"^name: expected a model, but there is no file {name}$"):
            resolve(name)


def test_a_pointer_of_git_lfs_is_named(tmp_path, no_network):
    folder = model_folder(tmp_path)
    (folder / PLAIN[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"^path: .*v\.safetensors is a pointer of Git LFS, .* `git lfs pull`"):
        fetch(resolve(folder))


def test_a_mistyped_name_does_not_blame_the_network_alone(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path, owner__down=TimeoutError("x"))
    with pytest.raises(ModelUnavailable, match=r"^owner/down .* is no folder here, nor a model .* the hub did not"):
        fetch(resolve("owner/down"))
    with pytest.raises(ModelUnavailable, match=r"^a/b is neither a folder here nor a model on the hub, .* check how"):
        fetch(resolve("a/b"))


def test_folders_never_ask_the_network(tmp_path, no_network):
    assert fetch(resolve(model_folder(tmp_path))) == tmp_path


def test_an_incomplete_folder_is_refused(tmp_path, no_network):
    model_folder(tmp_path, PLAIN[:1])
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "v.bin").touch()
    with pytest.raises(ValueError, match=r"^name: expected a model folder .* has no text_encoder, vae"):
        fetch(resolve(tmp_path))


def test_a_missing_toybox_says_how_to_make_it(tmp_path, monkeypatch, no_network):
    monkeypatch.setitem(MODELS, "toybox", replace(MODELS["toybox"], folder=tmp_path / "toybox-sd"))
    with pytest.raises(FileNotFoundError, match="run `make train-toybox`"):
        fetch(resolve("toybox"))


def test_a_model_is_downloaded_once_without_pickles(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, owner__model=PLAIN)
    folder = fetch(resolve("owner/model"))
    assert (folder / "unet" / "u.safetensors").is_file()
    allowed = hub.patterns[0]
    assert all(pattern.endswith((".json", ".txt", ".safetensors")) for pattern in allowed)
    assert not any(pattern.startswith("*") for pattern in allowed)  # single-file checkpoints lie at the top
    assert fetch(resolve("owner/model")) == folder and len(hub.asked) == 1


def test_the_revision_is_pinned(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, **{"stable-diffusion-v1-5__stable-diffusion-v1-5": PLAIN})
    fetch(SD15)
    assert hub.asked == [(SD15.repo, SD15.revision)]


def test_half_precision_takes_the_fp16_files_where_there_are_any(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path, owner__both=PLAIN + HALF, owner__full=PLAIN)
    both = fetch(resolve("owner/both"), half=True)
    assert sorted(path.name for path in both.rglob("*.safetensors")) == sorted(n.split("/")[1] for n in HALF)
    assert variant(both, half=True) == variant(both) == "fp16"
    full = fetch(resolve("owner/full"), half=True)
    assert variant(full, half=True) is None and (full / "unet" / "u.safetensors").is_file()
    fetch(resolve("owner/both"))  # now the other files as well
    assert variant(both, half=True) == "fp16" and variant(both) is None


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, RevisionNotFoundError])
def test_a_dead_id_leads_to_the_mirror(tmp_path, monkeypatch, kind):
    hub = Hub(monkeypatch, tmp_path, owner__old=gone(kind), owner__new=PLAIN)
    entry = Entry(name="m", repo="owner/old", revision="a" * 40, mirrors=("owner/older", "owner/new"))
    folder = fetch(entry)
    assert folder.name == "owner--new"
    assert hub.asked == [("owner/old", "a" * 40), ("owner/older", None), ("owner/new", None)]
    assert fetch(entry) == folder and len(hub.asked) == 3  # from the cache


def test_a_snapshot_that_vanishes_after_the_question_leads_to_the_mirror_too(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, owner__old=PLAIN, owner__new=PLAIN)
    download = hub.snapshot_download

    def dead(repo, **options):
        if repo == "owner/old" and not options.get("local_files_only"):
            raise gone(RepositoryNotFoundError)
        return download(repo, **options)

    monkeypatch.setattr(registry, "snapshot_download", dead)
    assert fetch(Entry(name="m", repo="owner/old", mirrors=("owner/new",))).name == "owner--new"


def test_no_id_left_is_one_clear_sentence(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path)
    with pytest.raises(ModelUnavailable) as failure:
        fetch(SD15)
    text = str(failure.value)
    assert all(repo in text for repo in (SD15.repo, *SD15.mirrors)) and "registry.py" in text and '"toybox"' in text
    assert "404" not in text and "\n" not in text and failure.value.__cause__ is None


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("x"), TimeoutError("x"), RuntimeError("of an HTTP library")])
def test_no_network_is_one_clear_sentence(tmp_path, monkeypatch, error):
    hub = Hub(monkeypatch, tmp_path, **{"stable-diffusion-v1-5__stable-diffusion-v1-5": error})
    expected = rf"^stable-diffusion.* \(4\.3 GB.* did not answer \({type(error).__name__}\)"
    with pytest.raises(ModelUnavailable, match=expected) as failure:
        fetch(SD15)
    assert isinstance(failure.value, ConnectionError) and failure.value.__suppress_context__
    assert len(hub.asked) == 1  # mirrors are for ids that are gone
    assert "\n" not in str(failure.value) and '"toybox"' in str(failure.value)


def test_a_repository_without_safetensors_is_refused(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path, owner__model=PLAIN[:2])
    for half in (False, True):
        with pytest.raises(ValueError, match=r"^name: expected a repository with safetensors .* owner/model"):
            fetch(resolve("owner/model"), half)


def test_known_hashes_are_checked_after_a_download(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, owner__model=PLAIN)
    right = hashlib.sha256(PLAIN[0].encode()).hexdigest()
    entry = Entry(name="m", repo="owner/model", sha256={PLAIN[0]: "0" * 64, HALF[0]: "not downloaded"})
    for _ in range(2):  # the damaged file does not stay for the next time
        with pytest.raises(ValueError, match=r"^name: unet/u\.safetensors of m has another SHA-256 than the registry"):
            fetch(entry)
    assert len(hub.asked) == 2
    assert (fetch(replace(entry, sha256={PLAIN[0]: right})) / PLAIN[0]).is_file()


def test_the_shipped_folder_by_its_path_is_the_toybox_model(tmp_path):
    """A path then gets the settings that suit the model; another folder has only its path as a name."""
    toybox = registry.MODELS["toybox"]
    assert registry.resolve(toybox.folder) is toybox and registry.resolve(f"{toybox.folder}/../toybox-sd") is toybox
    assert registry.resolve(tmp_path).name == str(tmp_path)
