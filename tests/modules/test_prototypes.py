import pytest
import torch

from glai_lightning.modules.prototypes import class_prototypes, positions_of, prototype_logits


def test_prototypes_are_the_means_of_their_classes():
    embeddings, labels = torch.randn(12, 4), torch.tensor([5, -3, 5, 40] * 3)
    prototypes, classes = class_prototypes(embeddings, labels)
    assert classes.tolist() == [-3, 5, 40]
    for prototype, label in zip(prototypes, (-3, 5, 40), strict=True):
        torch.testing.assert_close(prototype, embeddings[labels == label].mean(0))


def test_euclidean_logits_are_minus_the_squared_distances_even_far_from_zero():
    queries, prototypes = torch.randn(9, 6) + 1000, torch.randn(4, 6) + 1000
    expected = -(queries.double()[:, None] - prototypes.double()[None]).square().sum(2)
    torch.testing.assert_close(prototype_logits(queries, prototypes), expected.float(), rtol=1e-3, atol=1e-3)


def test_cosine_logits_do_not_depend_on_lengths():
    queries, prototypes = torch.randn(9, 6), torch.randn(4, 6)
    logits = prototype_logits(queries, prototypes, distance="cosine", cosine_scale=7.0)
    torch.testing.assert_close(logits, prototype_logits(queries * 3, prototypes * 5, distance="cosine", cosine_scale=7))
    expected = 7 * torch.cosine_similarity(queries[:, None], prototypes[None], dim=2)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_distances_are_in_single_precision_under_autocast(distance):
    support, labels, queries = torch.randn(8, 6), torch.arange(8) % 4, torch.randn(9, 6)
    expected = prototype_logits(queries, class_prototypes(support, labels)[0], distance=distance)
    with torch.autocast("cpu", torch.bfloat16):
        logits = prototype_logits(queries, class_prototypes(support, labels)[0], distance=distance)
    assert torch.equal(logits, expected)


def test_positions_find_the_column_of_each_label():
    assert positions_of(torch.tensor([9, -4, 7]), torch.tensor([-4, 7, 9])).tolist() == [2, 0, 1]


@pytest.mark.parametrize("label", [-9, 8, 100])
def test_a_label_without_a_prototype_is_named(label):
    with pytest.raises(ValueError, match=rf"to hold every class of the query, but it lacks \[{label}\]"):
        positions_of(torch.tensor([7, label]), torch.tensor([-4, 7, 9]))


def test_labels_that_are_no_integers_and_a_single_class_are_refused():
    with pytest.raises(TypeError, match=r"Expected `support_labels` to be a tensor of integers, but got torch.float32"):
        class_prototypes(torch.randn(2, 3), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"to hold at least 2 classes, but got \[3\]"):
        class_prototypes(torch.randn(2, 3), torch.tensor([3, 3]))
