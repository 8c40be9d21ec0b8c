"""pins: which lists count as exact pins, and what a model recorded."""

import mlflow
import pytest
from execution import ROOT
from sklearn.linear_model import LogisticRegression

from mlflow_lifecycle.pins import find_model_requirements, locked, parse_pins, read_pins

LOOSE = {
    "range": "scikit-learn>=1.9",
    "wildcard": "scikit-learn==1.*",
    "two conditions": "scikit-learn==1.2,!=1.2.1",
    "address": "scikit-learn @ https://user:hunter2@example.org/x==1.whl",
    "option": "--index-url https://user:hunter2@example.org/simple",
}


@pytest.mark.parametrize("line", LOOSE.values(), ids=LOOSE)
def test_line_that_leaves_the_version_open_is_refused_by_its_number(line):
    with pytest.raises(ValueError, match=r"the list, line 3, ") as error:
        parse_pins(f"# a comment\nnumpy==2.4\n{line}\n", "the list")
    assert "Compile the list with uv pip compile" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_list_without_a_pin_is_refused():
    with pytest.raises(ValueError, match="the list pins nothing"):
        parse_pins("\n\n# nothing but a comment\n", "the list")


def test_comments_blank_lines_and_line_ends_do_not_matter(tmp_path):
    (tmp_path / "pins.txt").write_bytes(b"numpy==2.4 # the arrays\r\n\r\n    # via\r\nzipp==4.1.2\r\n")
    assert read_pins(tmp_path / "pins.txt") == ["numpy==2.4", "zipp==4.1.2"]


DAMAGED = {"byte order mark": b"\xef\xbb\xbfnumpy==2.4\n", "not a text": b"\xff\xfe\x00"}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "pins.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"pins\.txt (cannot be read|begins with)"):
        read_pins(tmp_path / "pins.txt")


def test_missing_file_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*pins\.txt\."):
        read_pins(tmp_path / "pins.txt")


def test_pins_are_found_in_the_nearest_folder_above(tmp_path):
    # given a list in a folder, and a second one above it
    below = tmp_path / "one/two/three"
    below.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "one"):
        (folder / "model_requirements.txt").write_text("six==1.17.0\n")
    # then
    assert find_model_requirements(below) == tmp_path / "one/model_requirements.txt"


def test_list_that_is_found_must_pin(tmp_path):
    (tmp_path / "model_requirements.txt").write_text("six\n")
    with pytest.raises(ValueError, match="leaves the version open"):
        find_model_requirements(tmp_path)


def test_no_pins_anywhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no model_requirements\.txt in"):
        find_model_requirements(tmp_path)


def test_recorded_pins_are_those_of_the_file_in_mlflows_spelling(tmp_path):
    path = ROOT / "model_requirements.txt"
    model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    mlflow.sklearn.save_model(model, tmp_path / "model", pip_requirements=str(path))
    assert read_pins(tmp_path / "model/requirements.txt") == read_pins(path)


def test_locked_lines_are_those_of_the_pins_with_all_their_hashes(tmp_path):
    zipp = "zipp==4.1 \\\n    --hash=sha256:01 \\\n    --hash=sha256:02\n"
    (tmp_path / "lock.txt").write_text(f"numpy==2.4 \\\n    --hash=sha256:00\n    # via pandas\n{zipp}    # via a\n")
    assert locked(["zipp==4.1"], tmp_path / "lock.txt") == zipp


def test_lock_may_name_a_package_with_an_extra(tmp_path):
    (tmp_path / "lock.txt").write_text("uvicorn[standard]==0.30.0 \\\n    --hash=sha256:00\n")
    assert "--hash=sha256:00" in locked(["uvicorn==0.30.0"], tmp_path / "lock.txt")


def test_lock_in_utf_16_is_refused_by_its_name(tmp_path):
    (tmp_path / "lock.txt").write_text("numpy==2.4 --hash=sha256:00\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"lock\.txt cannot be read: 'utf-8' codec"):
        locked(["numpy==2.4"], tmp_path / "lock.txt")


def test_pin_that_the_lock_has_at_another_version_is_refused():
    with pytest.raises(ValueError, match=r"has no hash for numpy==0\.1\. Use the lock file that the pins are from"):
        locked(["numpy==0.1"], ROOT / "requirements.txt")


def test_pin_without_a_hash_is_refused(tmp_path):
    (tmp_path / "lock.txt").write_text("numpy==2.4\n    # via nothing\n")
    with pytest.raises(ValueError, match=r"has no hash for numpy==2\.4"):
        locked(["numpy==2.4"], tmp_path / "lock.txt")
