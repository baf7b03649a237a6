"""Families compared: what is paired, what holds among many, and what the tables say."""

import json
import math

import numpy as np
import pytest
import torch

from rhovae import POSTERIORS
from rhovae.study import families
from rhovae.study.records import SCHEMA


def record(dataset, posterior, seed, elbo, nll=None, latent=20):
    nll = elbo - 3.0 if nll is None else nll
    return {
        "schema": SCHEMA, "name": f"{dataset}-{posterior}-d{latent}-s{seed}", "history": [],
        "experiment": {"source": "full", "dataset": dataset, "posterior": posterior,
                       "latent": latent, "seed": seed},
        "test": {"loss": elbo, "negative_elbo": elbo, "reconstruction": elbo - 20, "kl": 20.0},
        "iwae": {"negative_elbo": elbo, "nll": nll},
        "latent": {"active_units": 12, "abs_rho": 0.5 if posterior.startswith("ar1") else None},
        "parameters": {}, "data": {}, "environment": {}, "wall_time_s": {},
    }  # fmt: skip


def panel(shifts, seeds=5):
    """Families that lie so many nats above the diagonal one, with a little noise over the seeds."""
    noise = np.random.default_rng(0).normal(size=(len(POSTERIORS), seeds)) * 0.1
    return {
        name: [
            record("mnist", name, seed, 100 + shifts.get(name, 0.0) + noise[k, seed])
            for seed in range(seeds)
        ]
        for k, name in enumerate(POSTERIORS)
    }


def test_a_panel_has_the_seeds_that_all_families_have(tmp_path):
    for name in POSTERIORS:
        for seed in range(3 if name == "full" else 4):
            made = record("mnist", name, seed, 100.0)
            (tmp_path / f"{made['name']}.json").write_text(json.dumps(made))
        made = record("fashion-mnist", name, 0, 240.0)  # a single seed has no interval
        (tmp_path / f"{made['name']}.json").write_text(json.dumps(made))
    found = families.panels(tmp_path, (10, 20))
    assert list(found) == ["mnist, d = 20"] and list(found["mnist, d = 20"]) == list(POSTERIORS)
    for runs in found["mnist, d = 20"].values():
        assert [r["experiment"]["seed"] for r in runs] == [0, 1, 2]
    (tmp_path / "mnist-full-d20-s2.json").unlink()
    (tmp_path / "mnist-full-d20-s1.json").unlink()
    assert families.panels(tmp_path, (20,)) == {}


def test_a_panel_may_have_fewer_families(tmp_path):
    names = ("diagonal", "ar1")
    for name, seed in [(name, seed) for name in names for seed in range(2)]:
        made = record("mnist", name, seed, 100.0, latent=25)
        (tmp_path / f"{made['name']}.json").write_text(json.dumps(made))
    assert list(families.panels(tmp_path, (25,), names)["mnist, d = 25"]) == list(names)
    assert families.panels(tmp_path, (25,)) == {}
    assert families.panels(tmp_path, (25,), (*names, "full")) == {}


def test_a_difference_is_that_of_each_seed():
    ones = [record("mnist", "ar1", seed, 100.0 + seed + gap) for seed, gap in enumerate((1, 2, 3))]
    others = [record("mnist", "diagonal", seed, 100.0 + seed) for seed in (2, 1, 0)]
    mean, low, high = families.difference(ones, others, families.MEASURES["−ELBO"])
    reach = 4.302652729911275 / math.sqrt(3)  # Student's t, two degrees of freedom; deviation 1
    assert (mean, low, high) == pytest.approx((2.0, 2 - reach, 2 + reach))


def test_what_holds_is_what_benjamini_and_hochberg_keep():
    """Against their rule by hand: the largest k with p_(k) <= k q / m, and all before it."""
    from scipy import stats

    found = {"mnist, d = 20": panel({"ar1": 2.0, "isotropic": 0.15, "full": -1.0})}
    signs = families.holding(found)
    p = {}
    for title, name, measure in signs:
        groups = found[title]
        pair = [
            families.MEASURES[measure](a) - families.MEASURES[measure](b)
            for a, b in zip(groups[name], groups["diagonal"], strict=True)
        ]
        p[title, name, measure] = stats.ttest_1samp(pair, 0).pvalue
    ordered = sorted(p, key=p.get)
    passed = [k for k, key in enumerate(ordered, 1) if p[key] <= 0.05 * k / len(p)]
    assert {key for key, sign in signs.items() if sign} == set(ordered[: max(passed)])
    assert signs["mnist, d = 20", "ar1", "−ELBO"] == 1
    assert signs["mnist, d = 20", "full", "IWAE-NLL"] == -1
    assert len(signs) == 2 * (len(POSTERIORS) - 1), "the diagonal one is what they are held against"


def test_comparisons_of_several_kinds_are_counted_together():
    """A difference may hold among a few, and no longer among many that are nothing."""
    alone = {"mnist, d = 20": panel({"ar1": 0.3})}
    pairs = families.comparisons(alone)
    assert families.together(pairs) == families.holding(alone)
    found = {key: pair for key, pair in pairs.items() if key[1] == "ar1"}
    assert families.together(found)["mnist, d = 20", "ar1", "−ELBO"] == 1
    nothing = {("none", k): np.array([-1.0, 0.0, 1.0]) for k in range(200)}
    assert not any(families.together(found | nothing).values())
    against = families.comparisons(alone, against="full")
    elbo = families.MEASURES["−ELBO"]
    expected = [elbo(a) - elbo(b) for a, b in zip(*(alone["mnist, d = 20"][n] for n in
                ("ar1", "full")), strict=True)]  # fmt: skip
    assert against["mnist, d = 20", "ar1", "−ELBO"].tolist() == expected
    assert not [key for key in against if key[1] == "full"]


def test_the_tables_have_a_row_for_each_family_and_mark_what_holds():
    found = {"mnist, d = 20": panel({"ar1": 2.0})}
    lines = families.family_table(found).splitlines()
    assert len(lines) == 2 + len(POSTERIORS) and len({line.count("|") for line in lines}) == 1
    assert "| mnist, d = 20 | ar1 | 5 | 10" in families.family_table(found)
    plain = families.difference_table(found).splitlines()
    theory = families.difference_table(found, {("mnist, d = 20", "ar1"): 1.25}).splitlines()
    for lines in (plain, theory):
        assert len(lines) == 1 + len(POSTERIORS) and len({line.count("|") for line in lines}) == 1
    (row,) = [line for line in theory if "| ar1 |" in line]
    assert row.count("**+") == 2 and row.endswith("| 1.25 |")
    (row,) = [line for line in plain if "| low-rank |" in line]
    assert "**" not in row
    none = dict.fromkeys(families.holding(found), 0)
    assert "**" not in families.difference_table(found, signs=none)


def test_the_lowest_value_is_found_and_the_parameters_are_there():
    x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    where = torch.tensor([0.5, 0.25], dtype=torch.float64)
    value = families.lowest(lambda: (x - where).square().sum().exp(), [x])
    assert value == pytest.approx(1.0) and torch.allclose(x.detach(), where, atol=1e-6)
