"""Studies of many small runs: appended one by one, resumed, refused where damaged."""

import json

import pytest

from rhovae.study.lines import read_lines, run_missing

SETTINGS = [{"seed": seed} for seed in range(4)]


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    path, made = tmp_path / "study.jsonl", []

    def run(seed):
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"square": seed**2}

    with pytest.raises(KeyboardInterrupt):
        run_missing(path, SETTINGS, run, progress=False)
    assert [r["result"]["square"] for r in read_lines(path)] == [0, 1]
    runs = run_missing(path, SETTINGS, run, progress=False)
    assert [r["result"]["square"] for r in runs] == [0, 1, 4, 9] and made == [0, 1, 2, 2, 3]
    assert run_missing(path, SETTINGS, None, progress=False) == runs
    assert runs[0]["environment"]["torch"] and runs[0]["seconds"] >= 0


def test_a_line_that_a_kill_cut_short_is_made_again(tmp_path):
    path = tmp_path / "study.jsonl"
    run_missing(path, SETTINGS[:2], lambda seed: {"seed": seed}, progress=False)
    path.write_text(path.read_text()[:-5])
    assert len(read_lines(path)) == 1
    runs = run_missing(path, SETTINGS, lambda seed: {"seed": seed}, progress=False)
    assert [r["result"]["seed"] for r in runs] == [0, 1, 2, 3]


def test_damage_elsewhere_and_numbers_that_json_lacks_are_refused(tmp_path):
    path = tmp_path / "study.jsonl"
    path.write_text(json.dumps({"settings": {}}) + "\n{half\n" + json.dumps({}) + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*study.jsonl is not JSON .* delete that"):
        read_lines(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_missing(tmp_path / "new.jsonl", SETTINGS, lambda seed: {"x": float("nan")}, False)
    assert read_lines(tmp_path / "new.jsonl") == []
