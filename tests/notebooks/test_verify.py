"""Guide 05, verification: nothing that was changed, or asks for what nobody reviewed, is loaded, whoever signed it.

The guide's own cells are run, on a folder as MLflow downloads it. A payload that writes a file when it is deserialised
proves that a refusal comes before that.
"""

import contextlib
import json
import shutil
import stat
from pathlib import Path

import mlflow
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from execution import ROOT, refusal, run_cells
from mlflow.models import infer_signature
from model_signing import hashing, signing
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/05_serve_and_monitor.ipynb"
FILES = ["MLmodel", "model.skops", "conda.yaml", "python_env.yaml", "requirements.txt"]
FILES += ["input_example.json", "serving_input_example.json"]
TREE = "sklearn.tree._tree.Tree"


class Payload(LogisticRegression):
    """A model that writes a file when it is deserialised."""

    def __setstate__(self, state):
        """Take ``state``, as pickle and skops both do."""
        Path(state["marker"]).touch()
        super().__setstate__(state)


def save(folder: Path, model=None, **options) -> Path:
    """Save ``model`` in ``folder`` as the guide does, fitted on Iris."""
    features, target = load_iris(return_X_y=True, as_frame=True)
    mlflow.sklearn.save_model(
        (LogisticRegression(max_iter=1000) if model is None else model).fit(features, target),
        folder,
        signature=infer_signature(features, target.astype(str)),
        input_example=features.head(3),
        pip_requirements=str(ROOT / "model_requirements.txt"),
        **options,
    )
    return folder


def signed(folder: Path, key: Path) -> Path:
    """Sign every file in ``folder``, and return the signature's path."""
    every_file = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    signature = folder.parent / "model.sig"
    signing.Config().set_hashing_config(every_file).use_elliptic_key_signer(private_key=key).sign(folder, signature)
    return signature


def written(path: Path, key, encryption=None) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    return path


@contextlib.contextmanager
def cells(*starts, **names):
    """Run cells of the guide, the one that makes keys among them, and give what they define until the block ends."""
    names = run_cells(GUIDE, starts, names)
    try:
        yield names
    finally:
        names["scratch"].cleanup()


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Give what the guide's cells about keys and verification define, with a store in a temporary folder."""
    store = tmp_path_factory.mktemp("store")
    with cells("import ", "newer = ", "def loaded_key", "def keep", "loader = ", store=store) as names:
        yield names


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Give the folder of a saved model. No test changes it."""
    return save(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original, tmp_path, guide):
    """Give a copy of the model and its signature, made with the guide's key."""
    folder = shutil.copytree(original, tmp_path / "model")
    return folder, signed(folder, guide["private_key"])


def refused(guide, folder, signature) -> str:
    with pytest.raises(ValueError, match=r"^Not loaded\. ") as caught:
        guide["verify"](folder, signature)
    return str(caught.value)


def test_saved_model_has_just_the_files_that_are_tampered_with(original):
    assert sorted(path.name for path in original.rglob("*")) == sorted(FILES)


def test_untouched_model_verifies(guide, model):
    assert guide["verify"](*model) is None


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_refused(guide, model, name):
    folder, signature = model
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert f"model.sig: Signature mismatch: Hash mismatch for {name}." in refused(guide, folder, signature)


@pytest.mark.parametrize("again", [False, True], ids=["not signed", "signed again"])
@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_refused(guide, model, name, again):
    folder, signature = model
    (folder / name).unlink()
    message = refused(guide, folder, signed(folder, guide["private_key"]) if again else signature)
    assert name in message
    assert "issing" in message


@pytest.mark.parametrize("again", [False, True], ids=["not signed", "signed again"])
@pytest.mark.parametrize("name", ["model.pkl", "code/more.py", ".gitattributes", "registered_model_meta"])
def test_an_added_file_is_refused(guide, model, name, again):
    folder, signature = model
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("more")
    message = refused(guide, folder, signed(folder, guide["private_key"]) if again else signature)
    assert message.startswith(f"Not loaded. {name.partition('/')[0] if again else 'model.sig'}: ")
    assert name in message or again


def test_a_link_is_refused(guide, model, tmp_path):
    # given a file that is the same, but lies where it can be changed later
    folder, signature = model
    (folder / "MLmodel").rename(tmp_path / "elsewhere")
    (folder / "MLmodel").symlink_to(tmp_path / "elsewhere")
    assert "MLmodel" in refused(guide, folder, signature)


CRAFTED = {
    "pickle": ({"serialization_format": "pickle"}, "model.pkl"),
    "cloudpickle": ({"serialization_format": "cloudpickle"}, "model.pkl"),
    "skops": ({"skops_trusted_types": ["test_verify.Payload"]}, "MLmodel"),
}


@pytest.fixture
def crafted(request, tmp_path):
    """Give the folder of a model that writes a file when it is loaded, and that file, which is not there."""
    options, _ = CRAFTED[request.param]
    payload = Payload(max_iter=1000)
    payload.marker = str(tmp_path / "marker")
    folder = save(tmp_path / "model", payload, **options)
    (tmp_path / "marker").unlink(missing_ok=True)
    return folder, tmp_path / "marker"


@pytest.mark.parametrize("crafted", CRAFTED, indirect=True)
def test_crafted_model_does_its_work_when_it_is_loaded(crafted):
    # given no verification, then MLflow believes the model; so the tests below show something
    folder, marker = crafted
    mlflow.pyfunc.load_model(str(folder))
    assert marker.exists()


@pytest.mark.parametrize("crafted", CRAFTED, indirect=True)
def test_crafted_model_is_refused_before_it_is_deserialised(guide, original, crafted, tmp_path):
    # given the signature of another model, which is good for that one
    folder, marker = crafted
    signature = signed(shutil.copytree(original, tmp_path / "signed/model"), guide["private_key"])
    message = refused(guide, folder, signature)
    assert "model.sig: Signature mismatch" in message
    assert "MLmodel" in message or "model.pkl" in message
    assert not marker.exists()


@pytest.mark.parametrize(("crafted", "name"), [(kind, CRAFTED[kind][1]) for kind in CRAFTED], indirect=["crafted"])
def test_crafted_model_is_refused_although_it_is_signed(guide, crafted, name):
    folder, marker = crafted
    message = refused(guide, folder, signed(folder, guide["private_key"]))
    assert message.startswith(f"Not loaded. {name}: ")
    assert "reviewed" in message
    assert not marker.exists()


@pytest.mark.parametrize("crafted", ["skops"], indirect=True)
def test_skops_file_is_asked_itself(guide, crafted):
    # given a signed model whose MLmodel keeps silent about what model.skops asks for
    folder, marker = crafted
    text = (folder / "MLmodel").read_text(encoding="utf-8")
    (folder / "MLmodel").write_text(text.replace("    - test_verify.Payload\n", ""), encoding="utf-8")
    message = refused(guide, folder, signed(folder, guide["private_key"]))
    assert message.startswith("Not loaded. model.skops: it asks for what nobody has reviewed: test_verify.Payload.")
    assert not marker.exists()


def test_pickle_under_the_name_of_a_skops_file_is_refused(guide, model, tmp_path):
    folder, _ = model
    save(tmp_path / "pickled", serialization_format="pickle")
    shutil.copy(tmp_path / "pickled/model.pkl", folder / "model.skops")
    assert refused(guide, folder, signed(folder, guide["private_key"])).startswith("Not loaded. model.skops: ")


@pytest.mark.parametrize(
    ("flavor", "key", "value"),
    [
        ("sklearn", "serialization_format", "pickle"),
        ("sklearn", "pickled_model", "../model.skops"),
        ("sklearn", "skops_trusted_types", ["builtins.eval"]),
        ("python_function", "loader_module", "code"),
        ("python_function", "model_path", "MLmodel"),
        ("python_function", "code", "."),
    ],
)
def test_signed_mlmodel_that_says_something_else_is_refused(guide, model, flavor, key, value):
    folder, _ = model
    content = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    content["flavors"][flavor][key] = value
    (folder / "MLmodel").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert refused(guide, folder, signed(folder, guide["private_key"])).startswith("Not loaded. MLmodel: ")


@pytest.mark.parametrize("reviewed", [[], [TREE]])
def test_only_the_projects_own_list_counts(guide, tmp_path, reviewed):
    # given a signed forest, whose MLmodel allows the type that forests need
    folder = save(tmp_path / "model", RandomForestClassifier(n_estimators=2), skops_trusted_types=[TREE])
    signature = signed(folder, guide["private_key"])
    names = run_cells(GUIDE, ["loader = "], guide | {"trusted_types": reviewed})
    # then it depends on the project's list whether it verifies
    if reviewed:
        names["verify"](folder, signature)
    else:
        assert TREE in refused(names, folder, signature)


def test_signature_with_anothers_key_is_refused(guide, model, tmp_path):
    other = written(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    message = refused(guide, model[0], signed(model[0], other))
    assert message.startswith("Not loaded. model.sig: Key mismatch")


def test_signature_with_anothers_key_that_names_ours_is_refused(guide, model, tmp_path):
    # given the signature of another, which says that it was made with our key
    folder, signature = model
    ours = json.loads(signature.read_text())["verificationMaterial"]
    other = written(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    theirs = json.loads(signed(folder, other).read_text())
    signature.write_text(json.dumps(theirs | {"verificationMaterial": ours}))
    # then
    assert refused(guide, folder, signature).startswith("Not loaded. model.sig: ")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80\x04N."])
def test_no_signature_is_refused(guide, model, content):
    folder, signature = model
    signature.unlink()
    if content is not None:
        signature.write_bytes(content)
    assert refused(guide, folder, signature).startswith("Not loaded. model.sig: ")


def test_key_is_made_once_for_its_owner_only(guide):
    private, public = guide["private_key"], guide["public_key"]
    assert private.parent == guide["store"] / "keys"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert sorted(path.name for path in private.parent.iterdir()) == ["signing_key.pem", "signing_key.pub"]
    before = private.read_bytes(), public.read_bytes()
    with cells("def keep", **guide | {"public_key": ""}):
        pass
    assert (private.read_bytes(), public.read_bytes()) == before


KEYS = {
    "none": (lambda path: path, "No such file"),
    "RSA": (lambda path: written(path, rsa.generate_private_key(65537, 2048)), "another kind of key"),
    "P-384": (lambda path: written(path, ec.generate_private_key(ec.SECP384R1())), "another kind of key"),
    "password": (
        lambda path: written(path, ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"secret")),
        "encrypted",
    ),
    "no key": (lambda path: path.write_text("no key") and path, "PEM"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_key_that_cannot_sign_is_refused_before_anything_is_written(tmp_path, kind):
    make, reason = KEYS[kind]
    path = make(tmp_path / "key.pem")
    error = refusal(GUIDE, signing_key=str(path))
    assert error.startswith(f"Cannot sign with {path}: ")
    assert reason in error
    assert "openssl" in error


def test_public_key_must_be_the_other_half(tmp_path, guide):
    path = written(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    error = refusal(GUIDE, signing_key=str(path), public_key=str(guide["public_key"]))
    assert error.startswith(f"Cannot verify with {guide['public_key']}: it is not the other half of signing_key")


def test_missing_public_key_is_refused(tmp_path):
    assert refusal(GUIDE, public_key=str(tmp_path / "none.pub")).startswith("Cannot verify with ")


def test_who_has_only_the_public_key_verifies_and_signs_nothing(tmp_path, guide, model):
    # given the guide with the public half alone
    half = Path(shutil.copy(guide["public_key"], tmp_path / "team.pub"))
    parameters = guide | {"public_key": str(half), "public_half": None, "store": tmp_path}
    with cells("def keep", "loader = ", "def registered", **parameters) as names:
        # then it verifies, makes no key, and registers nothing
        names["verify"](*model)
        assert not (tmp_path / "keys").exists()
        with pytest.raises(RuntimeError, match="no key to sign with"):
            names["registered"](None, None, "challenger")


def test_given_key_needs_no_file_beside_it(tmp_path, guide, model):
    path = written(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    parameters = guide | {"signing_key": str(path), "public_key": "", "store": tmp_path}
    with cells("def keep", "loader = ", **parameters) as names:
        names["verify"](model[0], signed(model[0], path))
    assert not (tmp_path / "keys").exists()
    assert [file.name for file in tmp_path.glob("key*")] == ["key.pem"]
