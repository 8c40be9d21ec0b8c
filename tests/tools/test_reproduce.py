"""`make reproduce`: what it compares, and that it finds what differs."""

import base64
import io

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import reproduce
from execution import text_outputs
from nbformat.v4 import new_code_cell, new_notebook, new_output
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline


def picture(value: float = 0.5, **metadata: str) -> str:
    """Return a picture of 20 by 20 pixels, one of which has that brightness."""
    pixels = np.full((20, 20), 0.5)
    pixels[7, 3] = value
    content = io.BytesIO()
    plt.imsave(content, pixels, cmap="gray", vmin=0, vmax=1, metadata=metadata)
    return base64.b64encode(content.getvalue()).decode()


def executed(text: str = "accuracy 0.93\n", image: str = "", tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """Return a notebook of one cell that printed ``text`` and showed a picture."""
    shown = new_output("display_data", {"image/png": image or picture(), "text/plain": "<Figure>"})
    outputs = [new_output("stream", name="stdout", text=text), shown]
    return new_notebook(cells=[new_code_cell("...", outputs=outputs, metadata={"tags": list(tags)})])


def differences(notebook: nbformat.NotebookNode, other: nbformat.NotebookNode) -> list[str]:
    """Return the names of the outputs that differ."""
    found = reproduce.differences(reproduce.outputs(notebook), reproduce.outputs(other))
    return [name for names in found.values() for name in names]


def test_order_of_the_two_streams_is_no_difference():
    # given a cell that prints to both, of which one came first here and the other one there
    notebook, other = executed(), executed()
    for at, cell in ((0, notebook.cells[0]), (1, other.cells[0])):
        cell.outputs.insert(at, new_output("stream", name="stderr", text="Registered.\n"))
    # then
    assert differences(notebook, other) == []
    assert text_outputs(notebook) == text_outputs(other)


def test_altered_pixel_is_found_and_what_a_picture_says_of_its_making_does_not_count():
    # given one pixel of 400 that differs by one step of 255, and a picture that another program has written
    altered, other = picture(0.5 + 1 / 255), picture(Software="another matplotlib")
    assert other != picture()
    # then
    assert differences(executed(), executed(image=altered)) == ["cell 1, output 2, image/png"]
    assert differences(executed(), executed(image=other)) == []


def test_altered_or_missing_output_is_found():
    assert differences(executed(), executed("accuracy 0.94\n")) == ["cell 1, output 1, text"]
    # given one without its picture, then it is found whichever has it
    fewer = executed()
    del fewer.cells[0].outputs[1]
    missing = ["cell 1, output 2, text/plain", "cell 1, output 2, image/png"]
    assert differences(executed(), fewer) == missing
    assert differences(fewer, executed()) == missing


def test_measured_times_and_what_the_rules_allow_do_not_count():
    tags = ("nbval-ignore-output",)
    assert differences(executed("3.1 s\n", tags=tags), executed("2.9 s\n", tags=tags)) == []
    served = [f"http://127.0.0.1:{port}/invocations\n" for port in (5001, 40123)]
    assert differences(executed(served[0]), executed(served[1])) == []


def test_parameters_are_equal_only_if_every_bit_is():
    # given two models that learned the same
    rows = np.random.default_rng(0).normal(size=(60, 3))
    forest = RandomForestClassifier(n_estimators=5, random_state=0)
    model, other = (make_pipeline(SimpleImputer(), clone(forest)).fit(rows, rows[:, 0] > 0) for _ in range(2))
    assert reproduce.digest(model) == reproduce.digest(other)
    # when the smallest part of one is altered by the smallest step
    tree = other[-1].estimators_[3].tree_
    tree.threshold[0] = np.nextafter(tree.threshold[0], 9)
    # then
    assert reproduce.digest(model) != reproduce.digest(other)


def test_unset_bytes_between_the_fields_of_a_table_do_not_count():
    # given two arrays of the same values, with other bytes between their fields
    fields = np.dtype([("left", "u1"), ("threshold", "f8")], align=True)
    array, other = (np.frombuffer(bytearray([filling]) * 2 * fields.itemsize, dtype=fields) for filling in (0, 255))
    for filled in (array, other):
        filled["left"], filled["threshold"] = 1, 0.5
    assert array.tobytes() != other.tobytes()
    # then
    assert reproduce.digest(array) == reproduce.digest(other)
    other["threshold"][1] = 0.25
    assert reproduce.digest(array) != reproduce.digest(other)


def test_altered_prediction_is_found():
    probabilities = np.array([[0.2, 0.8], [0.5, 0.5]])
    classes = np.array(["yes", "no"], dtype=object)
    digest = reproduce.digest([classes, probabilities])
    assert reproduce.digest([classes.copy(), probabilities.copy()]) == digest
    assert reproduce.digest([classes, np.nextafter(probabilities, 1)]) != digest
    assert reproduce.digest([classes[::-1], probabilities]) != digest


def test_rows_to_predict_are_always_the_same_and_not_just_the_example():
    example = pd.DataFrame({"size": [1.0, 2.0, np.nan], "count": [1, 2, 3], "colour": ["red", "blue", "red"]})
    rows = reproduce.many_rows(example)
    pd.testing.assert_frame_equal(rows, reproduce.many_rows(example))
    assert rows.dtypes.equals(example.dtypes)
    assert len(rows) == 500
    assert rows["size"].nunique() > 300


def test_every_setting_that_is_varied_differs():
    varied = {"folder", "home", "time_zone", "locale", "hash_seed", "threads", "network"}
    assert set(reproduce.ELSEWHERE.varied(reproduce.FIRST)) == varied
