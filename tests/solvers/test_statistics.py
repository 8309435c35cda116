import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_groups import run_in_processes
from torch import Tensor, nn

from glai_lightning import GLAIHead, eugen_head, freeze_structure, mlp_head, random_feature_head
from glai_lightning.solvers import LogisticSolver, PathStatistics, RidgeSolver, average_heads, set_last_layer

ROWS, WIDTH, CLASSES = 1500, 24, 4


def make_data(condition: float = 1e6, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features of a condition number, and labels that they tell something of."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (ROWS, WIDTH))
    scales = torch.logspace(0, -math.log10(condition), WIDTH, dtype=torch.float64)
    features = torch.linalg.qr(rows)[0] * scales @ torch.linalg.qr(columns)[0] * ROWS**0.5
    noise = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return (features + 0.3).to(dtype), (features @ columns[:, :CLASSES] + 0.3 * noise).argmax(1)


def statistics(features=None, targets=None, **arguments) -> PathStatistics:
    made = PathStatistics(nn.Identity(), **arguments)
    return made if features is None else made.update(features, targets)


def parts(*tensors):
    return zip(*tensors, strict=True)


def apart(found, expected) -> float:
    return float(((found.weight - expected.weight).norm() / expected.weight.norm()).detach())


def accuracy(solution, features, labels, classes=None) -> float:
    predicted = F.linear(features.double(), solution.weight, solution.bias).argmax(1)
    return float(((predicted if classes is None else torch.tensor(classes)[predicted]) == labels).double().mean())


@pytest.mark.parametrize(
    ("condition", "l2", "dtype", "merged_within", "forgotten_within"),
    [
        (1e6, 0.0, torch.float64, 1e-10, 1e-8),
        (1e6, 1e-9, torch.float64, 1e-10, 1e-8),
        # Sums over float32 features have the digits of float64, of which the squared condition number takes its share.
        (1e3, 1e-5, torch.float32, 1e-10, 1e-8),
    ],
)
def test_shards_updates_and_forgetting_have_the_solution_of_all_samples(
    condition, l2, dtype, merged_within, forgotten_within
):
    features, labels = make_data(condition, dtype)
    whole = statistics(features, labels).solve(l2)
    shards = [statistics(*part, classes=range(CLASSES)) for part in parts(features.chunk(8), labels.chunk(8))]
    assert apart(sum(shards).solve(l2), whole) <= merged_within
    updated = statistics(classes=range(CLASSES))
    for part in parts(features.flip(0).split(151), labels.flip(0).split(151)):
        updated.update(*part)
    assert apart(updated.solve(l2), whole) <= merged_within
    streamed = statistics(classes=range(CLASSES)).update(parts(features.split(200), labels.split(200)))
    assert apart(streamed.solve(l2), whole) <= merged_within
    kept = statistics(features[600:], labels[600:], classes=range(CLASSES)).solve(l2)
    for part in parts(features[:600].split(130), labels[:600].split(130)):
        updated.forget(*part)
    assert updated.samples == ROWS - 600
    assert apart(updated.solve(l2), kept) <= forgotten_within


def test_the_solution_is_that_of_the_ridge_solver():
    features, labels = make_data(10.0)
    found = statistics(features, labels).solve(l2=0.03)
    start = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    expected = RidgeSolver(l2=0.03).solve_features(features, labels, weight=start, bias=start[:, 0])
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-12)
    numbers = torch.stack([features[:, 0], features[:, 1] + 2.0 * features[:, 2]], dim=1)
    fit = statistics(features, numbers).solve(l2=0.0)
    assert torch.allclose(F.linear(features, fit.weight, fit.bias), numbers, atol=1e-8)


def test_a_strength_is_chosen_by_statistics_of_validation_data():
    features, labels = make_data(100.0)
    training, held_out = statistics(features[:60], labels[:60]), (features[200:], labels[200:])
    strengths = [10.0**exponent for exponent in range(-6, 3)]
    chosen = training.solve(strengths, validation=statistics(*held_out))

    def error(l2):
        fit = training.solve(l2)
        return (F.linear(held_out[0], *fit[:2]) - F.one_hot(held_out[1])).square().mean().item()

    errors = {l2: error(l2) for l2 in strengths}
    assert chosen.report.l2 == pytest.approx(min(errors, key=errors.get))
    for l2, score in chosen.report.tried:
        assert score == pytest.approx(-errors[l2], rel=1e-9)
    for other in (held_out, [held_out]):
        assert torch.equal(training.solve(strengths, validation=other).weight, chosen.weight)


def test_without_validation_the_generalised_cross_validation_score_chooses():
    features, labels = make_data(100.0)
    few = features[:60]
    solution = statistics(few, labels[:60]).solve([1e-4, 1e-2, 1.0])
    centred, targets = few - few.mean(0), F.one_hot(labels[:60]).double()
    for l2, score in solution.report.tried:
        gram = centred.t() @ centred
        hat = centred @ torch.linalg.solve(gram + 60 * l2 * torch.eye(WIDTH, dtype=torch.float64), centred.t()) + 1 / 60
        errors = (targets - hat @ targets).square().mean() / (1 - hat.trace() / 60) ** 2
        assert score == pytest.approx(-float(errors), rel=1e-8)


def test_classes_are_matched_by_label_and_new_ones_appended():
    features, labels = make_data(10.0)
    names = ["ant", "bee", "cat", "dog"]
    first = labels < 2
    one = statistics(features[first], [names[label] for label in labels[first]], classes=["bee", "ant"])
    two = statistics(features[~first], labels[~first] - 1, classes=["bee", "cat", "dog"])
    merged = one + two
    assert merged.classes == ["bee", "ant", "cat", "dog"]
    assert merged.counts == {name: int((labels == place).sum()) for place, name in enumerate(names)}
    whole = statistics(features, labels, classes=names).solve(0.1)
    assert torch.allclose(merged.solve(0.1).weight, whole.weight[[1, 0, 2, 3]], rtol=1e-10)
    grown = statistics(features[first], labels[first]).update(features[~first], labels[~first])
    assert grown.classes == [0, 1, 2, 3]
    assert torch.allclose(grown.solve(0.1).weight, whole.weight, rtol=1e-10)


def test_many_rows_are_added_some_at_a_time_and_none_where_one_is_bad(monkeypatch):
    features, labels = make_data()
    whole = statistics(features, labels)
    monkeypatch.setattr("glai_lightning.solvers.statistics._ROWS", 400)
    assert apart(statistics(features, labels).solve(0.0), whole.solve(0.0)) <= 1e-10
    with pytest.raises(ValueError, match="but got infinity in row 901"):
        whole.update(features.index_fill(0, torch.tensor([901]), math.inf), labels)
    assert whole.samples == ROWS


def test_a_class_that_is_forgotten_leaves_no_trace():
    features, labels = make_data(1e4)
    gone = labels == 2
    without = statistics(features[~gone], labels[~gone], classes=range(CLASSES)).solve(1e-6)
    left = statistics(features, labels, classes=range(CLASSES)).forget(features[gone], labels[gone])
    assert left.counts[2] == 0
    assert not left.solve(1e-6).weight[2].any()
    assert apart(left.solve(1e-6), without) <= 1e-10
    assert left.forget(features[~gone], labels[~gone]).samples == 0
    with pytest.raises(ValueError, match="at least one sample"):
        left.solve()


def test_discriminant_analysis_and_prototypes_come_from_the_same_sums():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.neighbors import NearestCentroid

    features, labels = make_data(10.0)
    all_ = statistics(features, labels, classes=range(CLASSES + 1))
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(features.numpy(), labels.numpy())
    found = all_.solve(l2=0.0, head="lda")
    logits = F.linear(features, found.weight, found.bias)
    assert torch.allclose(logits[:, :-1].softmax(1), torch.from_numpy(expected.predict_proba(features.numpy())))
    assert logits[:, -1].max() < -1e20
    centroids = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(features.numpy())
    assert accuracy(all_.solve(head="prototypes"), features, torch.from_numpy(centroids)) == 1.0
    means, precision = torch.from_numpy(expected.means_), torch.linalg.inv(torch.from_numpy(expected.covariance_))
    weight, offsets = means @ precision, -0.5 * ((means @ precision) * means).sum(1)
    balanced = all_.solve(l2=0.0, head="lda", class_weights="balanced")
    assert torch.allclose(balanced.weight[:-1] - balanced.weight[0], weight - weight[0], atol=1e-8)
    assert torch.allclose(balanced.bias[:-1] - balanced.bias[0], offsets - offsets[0], atol=1e-8)


def test_weights_of_classes_are_exact_where_classes_have_one_covariance():
    generator = torch.Generator().manual_seed(0)
    around = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64)
    around = torch.cat([around, -around])
    means = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    rows = [torch.cat([around] * times) + mean for times, mean in zip((3, 1), means, strict=True)]
    labels = torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(part) for part in rows]))
    unequal = statistics(torch.cat(rows), labels)
    equal = statistics(torch.cat([rows[0][:400], rows[1]]), torch.arange(2).repeat_interleave(400))
    for weights in ("balanced", [1.0, 3.0], {1: 3.0}):
        assert apart(unequal.solve(0.1, class_weights=weights), equal.solve(0.1)) < 1e-10
    assert apart(unequal.solve(0.1), equal.solve(0.1)) > 1e-3


def make_head(outputs: int = CLASSES, **arguments):
    torch.manual_seed(0)
    return freeze_structure(mlp_head(WIDTH, 16, outputs), **arguments)


@pytest.mark.parametrize("paths", ["output", "independent"])
def test_a_head_is_solved_and_grows_with_its_classes(paths):
    features, labels = make_data(10.0, torch.float32)
    head, twin = make_head(paths=paths), make_head(paths=paths)
    set_last_layer(head, PathStatistics(head).update(features, labels).solve(l2=1e-3))
    RidgeSolver(l2=1e-3).solve(twin, features, labels)
    assert torch.allclose(head(features), twin(features), atol=1e-5)
    more = PathStatistics(head).update(features, labels).update(features[:50] + 9.0, torch.full((50,), 7))
    if paths == "independent":
        with pytest.raises(ValueError, match="Expected `paths` to be 'output' for a solution of 5 outputs"):
            set_last_layer(head, more.solve())
        return
    set_last_layer(head, more.solve())
    assert head(features).shape == (ROWS, 5)
    assert bool((head(features[:50] + 9.0).argmax(1) == 4).all())
    single = make_head(1)
    set_last_layer(single, PathStatistics(single).update(features, labels == 1).solve(l2=1e-3))
    twin = make_head(1)
    RidgeSolver(l2=1e-3).solve(twin, features, (labels == 1).long())
    assert torch.allclose(single(features), twin(features), atol=1e-5)


@pytest.mark.parametrize("make", [random_feature_head, eugen_head])
def test_a_head_on_fixed_features_is_frozen_and_solved(make):
    features, labels = make_data(10.0, torch.float32)
    head = random_feature_head(WIDTH, 200, CLASSES) if make is random_feature_head else eugen_head(WIDTH, CLASSES)
    scaled = nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), head)
    set_last_layer(head, PathStatistics(scaled).update(features, labels).solve(class_weights="balanced"))
    assert isinstance(head, GLAIHead)
    assert float((scaled(features).argmax(1) == labels).float().mean()) > 0.6


def test_a_cross_entropy_solve_goes_on_from_the_merged_solution():
    features, labels = make_data(10.0, torch.float32)
    head = make_head()
    set_last_layer(head, PathStatistics(head).update(features, labels).solve(l2=1e-3))
    merged = F.cross_entropy(head(features), labels).item()
    penalty = 5e-4 * head[-1].weight.square().sum().item()
    report = LogisticSolver(l2=1e-3).solve(head, features, labels)
    assert report.start_loss == pytest.approx(merged + penalty, rel=1e-3)
    assert F.cross_entropy(head(features), labels) < 0.8 * merged


def test_the_mean_of_heads_has_the_mean_of_their_outputs():
    head, x = make_head(paths="independent").double(), torch.randn(7, WIDTH, dtype=torch.float64)
    heads = [copy.deepcopy(head) for _ in range(3)]
    for other in heads:
        nn.init.normal_(other[-1].path_weights)
    outputs = torch.stack([other(x) for other in heads])
    assert torch.allclose(average_heads(heads)(x), outputs.mean(0), rtol=1e-12)
    weighted = average_heads(heads, [1.0, 0.0, 3.0])(x)
    assert torch.allclose(weighted, (outputs[0] + 3.0 * outputs[2]) / 4.0, rtol=1e-12)
    for wrong, message in (
        ([], "at least one head"),
        ([heads[0], freeze_structure(mlp_head(WIDTH, 16, CLASSES), paths="independent").double()], "of one structure"),
    ):
        with pytest.raises(ValueError, match=message):
            average_heads(wrong)


def test_the_fingerprint_is_of_what_features_depend_on():
    def first_of(head, *changes):
        for change in changes:
            change(head)
        made = PathStatistics(head).update(torch.randn(4, WIDTH).to(head[0].weight.dtype), torch.arange(4))
        return made.state_dict()["fingerprint"]

    def with_norm():
        torch.manual_seed(0)
        return mlp_head(WIDTH, 16, CLASSES, batch_norm=True)

    plain = first_of(freeze_structure(with_norm()))
    assert first_of(freeze_structure(with_norm())) == plain
    assert first_of(freeze_structure(with_norm()), lambda head: nn.init.zeros_(head[-1].weight)) == plain
    changes = [
        lambda head: head[0].weight.data[0, 0].add_(1e-3),
        lambda head: head[1].running_mean[0].add_(1e-3),
        lambda head: head.double(),
    ]
    other = freeze_structure(nn.Sequential(*with_norm()[:2], nn.LeakyReLU(), with_norm()[-1]))
    assert len({plain, first_of(other), *(first_of(freeze_structure(with_norm()), change) for change in changes)}) == 5


def test_statistics_come_back_from_a_file(tmp_path):
    features, labels = make_data(1e6)
    kept = statistics(features, labels)
    kept.save(tmp_path / "site.pt")
    for loaded in (statistics().load(tmp_path / "site.pt"), PathStatistics(None).load(tmp_path / "site.pt")):
        assert torch.equal((loaded + kept).solve(0.0).weight, (kept + kept).solve(0.0).weight)
    assert statistics().load_state_dict(kept.state_dict()).counts == kept.counts


BAD = {
    "another width": (lambda x, y: (x[:, 1:], y), ValueError, "Expected 24 features a sample, but got 23"),
    "another dtype": (lambda x, y: (x.float(), y), ValueError, "Expected features of float64, as before, but got fl"),
    "numbers": (lambda x, y: (x, y.double()), TypeError, "Expected all targets to be class labels"),
    "names": (lambda x, y: (x, ["a"] * len(x)), TypeError, "all integers or all strings, but got `int` and `str`"),
    "NaN": (lambda x, y: (x.index_fill(0, torch.tensor([7]), math.nan), y), ValueError, "but got NaN in row 7"),
    "too large": (lambda x, y: (x * 1e200, y), ValueError, "finite, and their squares too, but got"),
    "no rows": (lambda x, y: (x[:0], y[:0]), ValueError, "Expected at least one sample, but got none"),
    "no batches": (lambda x, y: ([], None), ValueError, "Expected at least one sample, but got none"),
    "fewer labels": (lambda x, y: (x, y[1:]), ValueError, "Expected as many targets as features, but got 1499 and 15"),
    "negative": (lambda x, y: (x, y - 1), ValueError, "Expected class labels of at least 0, but got -1"),
    "a bad batch": (lambda x, y: ([(x, y), (x * math.nan, y)], None), ValueError, "but got NaN in row 0"),
    "no pair": (lambda x, y: ([x], None), TypeError, r"Expected every batch to be a pair \(inputs, targets\)"),
    "mixed labels": (lambda x, y: (x, [1, "a"]), TypeError, "all integers or all strings, but got `int` and `str`"),
    "no tensor": (lambda x, y: (x, 3), TypeError, "Expected targets to be a tensor, or a list of labels"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", ["update", "forget"])
def test_bad_samples_are_an_error_and_change_nothing(case, method):
    make, error, message = BAD[case]
    features, labels = make_data()
    there = statistics(features, labels)
    before = there.state_dict()
    with pytest.raises(error, match=message):
        getattr(there, method)(*make(features, labels))
    after = there.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("high", "low", "squares"))
    assert after["classes"] == before["classes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_than_was_there_is_not_forgotten(dtype):
    features, labels = make_data(100.0, dtype)
    numbers = features[:, :2].double()
    for targets, wrong, message in (
        (labels[:90], (features[:91], labels[:91]), r"at most the \d+ samples of class \d that were added"),
        (labels[:90], (features[:1], torch.tensor([9])), "there are no samples of class 9"),
        (labels[:90], (features[90:130], labels[:40]), "not positive semidefinite"),
        (labels[:90], (features[90:180], labels[:90]), "not positive semidefinite"),
        (numbers[:90], (features[90:130], numbers[:40]), "not positive semidefinite"),
        (numbers[:90], (features[:91], numbers[:91]), "at most the 90 samples that were added, but got 91"),
    ):
        there = statistics(features[:90], targets)
        before = there.state_dict()
        with pytest.raises(ValueError, match=message):
            there.forget(*wrong)
        assert torch.equal(there.state_dict()["high"], before["high"])
    with pytest.raises(ValueError, match="there are no samples"):
        statistics().forget(features, labels)


def test_statistics_of_other_features_are_refused():
    features, labels = make_data(10.0, torch.float32)
    head = make_head()
    there = PathStatistics(head).update(features, labels)
    other = PathStatistics(freeze_structure(mlp_head(WIDTH, 16, CLASSES))).update(features, labels)
    with pytest.raises(ValueError, match="of the same feature map, with the fingerprint"):
        there + other
    with pytest.raises(ValueError, match="of the same feature map"):
        there.solve(validation=other)
    with pytest.raises(ValueError, match="of the same feature map"):
        PathStatistics(make_head().double()).load_state_dict(there.state_dict())
    with pytest.raises(ValueError, match="with classes that there are samples of, but got 9"):
        there.solve(validation=(features[:2], torch.tensor([0, 9])))
    with torch.no_grad():
        head[0].weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="of the same feature map"):
        there.update(features, labels)
    with pytest.raises(TypeError, match="but got `int` and `str`"):
        statistics(features, labels) + statistics(features, ["a"] * ROWS)
    for classes in ([0, "a"], [True, False], "ab", []):
        with pytest.raises(TypeError, match="all integers or all strings"):
            PathStatistics(nn.Identity(), classes)
    with pytest.raises(ValueError, match="Expected every class once, but got 1 twice"):
        PathStatistics(nn.Identity(), [1, 2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"version": 2}, "to be of version 1, but got version 2"),
        (lambda state: {"state_dict": {}}, "it holds something else"),
        (lambda state: [state], "to hold statistics, but got a `list`"),
        (lambda state: state | {"high": -state["high"]}, "Expected counts of samples of at least 0"),
        (lambda state: state | {"high": state["high"] * math.nan}, "to be finite, but got NaN"),
        (lambda state: state | {"high": state["high"][:, 1:]}, "to be of one size"),
        (lambda state: state | {"high": torch.zeros((), dtype=torch.float64).expand(10**6, 10**6 + 4)}, "of one size"),
        (lambda state: state | {"classes": [0, "a", 2, 3]}, "all integers or all strings"),
        (lambda state: {k: v for k, v in state.items() if k != "low"}, "Expected `low` in "),
    ],
)
def test_a_file_that_holds_no_statistics_is_refused(tmp_path, change, message):
    features, labels = make_data()
    there = statistics(features, labels)
    torch.save(change(there.state_dict()), tmp_path / "site.pt")
    with pytest.raises((ValueError, TypeError), match=message):
        there.load(tmp_path / "site.pt")
    assert there.samples == ROWS


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    statistics(*make_data()).save(tmp_path / "site.pt")
    whole = (tmp_path / "site.pt").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9], b"", b"PK"):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"Expected .* to hold statistics"):
            statistics().load(tmp_path / "cut.pt")


@pytest.mark.processes
def test_processes_add_up_in_one_reduction(tmp_path, monkeypatch):
    features, labels = make_data()
    # The first process has one class alone, the second nothing, and the last the other classes.
    shares = [labels == 1, labels < 0, labels != 1]
    reductions = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **named: reductions.append(1) or reduce(*args, **named))

    def add_up(rank):
        own = statistics()
        if shares[rank].any():
            own.update(features[shares[rank]], labels[shares[rank]])
        own.all_reduce(dist.group.WORLD)
        mixed = statistics(features, labels if rank else ["a"] * ROWS)
        with pytest.raises(TypeError, match="all integers or all strings"):
            mixed.all_reduce(dist.group.WORLD)
        return own.classes, own.solve(1e-9).weight, len(reductions), mixed.samples

    for classes, weight, count, samples in run_in_processes(add_up, tmp_path, 3):
        order = [classes.index(label) for label in range(CLASSES)]
        whole = statistics(features, labels).solve(1e-9).weight
        assert float((weight[order] - whole).norm() / whole.norm()) <= 1e-10
        assert (count, samples) == (1, ROWS)
