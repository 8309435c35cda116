import copy
import io
import pickle

import pytest
import torch
from head_examples import HEADS, C, D, FunctionalHead, H, trained
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from glai_lightning import ChurnProbe, GLAIHead, activation_patterns, freeze_structure, mlp_head
from glai_lightning.heads import freeze_in_place, unfreeze_in_place

PATHS = ("output", "tangent", "independent")


def relative_error(outputs, expected):
    return ((outputs - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_conversion_is_exact(name, paths, dtype, tolerance):
    mlp = trained(HEADS[name](), dtype)
    x = torch.randn(50, D, dtype=dtype)
    before = copy.deepcopy(mlp.state_dict())
    head = freeze_structure(mlp, paths=paths)
    assert relative_error(head(x), mlp(x)) <= (0 if paths == "output" else tolerance)
    assert all(torch.equal(a, b) for a, b in zip(head.patterns(x), activation_patterns(mlp, x), strict=True))
    assert all(torch.equal(value, before[key]) for key, value in mlp.state_dict().items())
    assert all(p.requires_grad for p in mlp.parameters() if p.ndim == 2)


@given(
    sizes=st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 5)),
    leading=st.lists(st.integers(0, 3), max_size=3),
    paths=st.sampled_from(PATHS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_conversion_is_exact_for_any_shape_depth_and_dtype(sizes, leading, paths, dtype):
    inputs, hidden, outputs = sizes
    mlp = mlp_head(inputs, hidden, outputs).to(dtype).eval()
    head = freeze_structure(mlp, paths=paths).eval()
    x = torch.randn(*leading, inputs, dtype=dtype)
    expected = mlp(x)
    assert head(x).shape == expected.shape
    assert head(x).dtype == dtype
    if expected.numel():
        tolerance = 0 if paths == "output" else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert (head(x) - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_new_tensors_take_the_dtype_of_the_old(paths, dtype):
    head = freeze_structure(mlp_head(D, [H, 5], C).to(dtype), paths=paths)
    assert {tensor.dtype for tensor in (*head.parameters(), *head.buffers())} == {dtype}
    assert head(torch.randn(3, D, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("paths", PATHS)
def test_structure_does_not_move_when_the_head_is_trained(paths):
    head = freeze_structure(mlp_head(D, [H, 5], C, batch_norm=True), paths=paths).train()
    x = torch.randn(100, D)
    patterns = head.patterns(x)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        head(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(head.patterns(x), patterns, strict=True))


@pytest.mark.parametrize("paths", PATHS)
def test_gradients_reach_the_inputs_for_a_trainable_backbone(paths):
    mlp = mlp_head(D, H, C).double()
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, C, dtype=torch.float64)
    (expected,) = torch.autograd.grad((mlp(x) * weights).sum(), x)
    (gradient,) = torch.autograd.grad((freeze_structure(mlp, paths=paths)(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_tangent_gradients_at_the_freeze_are_those_of_the_mlp():
    mlp = mlp_head(D, [H, 5], C).double()
    head = freeze_structure(mlp, paths="tangent")
    x = torch.randn(20, D, dtype=torch.float64)
    mlp(x).square().sum().backward()
    head(x).square().sum().backward()
    for name, parameter in mlp.named_parameters():
        torch.testing.assert_close(head.get_parameter(name).grad, parameter.grad)


def test_output_paths_train_the_last_linear_only():
    head = freeze_structure(mlp_head(D, H, C, batch_norm=True))
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == H * C + C
    head(torch.randn(5, D)).sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]


def test_freezing_in_place_keeps_the_very_modules_and_parameters():
    mlp = mlp_head(D, H, C)
    parameters, modules = dict(mlp.named_parameters()), list(mlp)
    head = freeze_in_place(mlp)
    assert {name: id(p) for name, p in head.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert head is mlp
    assert list(head) == modules
    assert head[0] is modules[0]
    assert head[-1] is modules[-1]
    assert len(head) == 3


@pytest.mark.parametrize("name", ["lightly's SimCLR projection", "timm's Mlp"])
def test_a_converted_head_answers_to_its_old_names(name):
    mlp = HEADS[name]()
    children = dict(mlp.named_children())
    head = freeze_in_place(mlp)
    assert all(getattr(head, child_name) is child for child_name, child in children.items())


def test_hooks_of_the_user_go_on_firing_and_can_be_removed():
    mlp, calls = mlp_head(D, H, C), []
    handle = mlp.register_forward_hook(lambda *_: calls.append("head"))
    mlp[0].register_forward_hook(lambda *_: calls.append("inner"))
    head = freeze_in_place(mlp)
    calls.clear()
    head(torch.randn(2, D))
    assert calls == ["inner", "head"]
    handle.remove()
    head(torch.randn(2, D))
    assert calls == ["inner", "head", "inner"]


def test_batch_norm_inside_stays_frozen_in_training_mode():
    head = freeze_structure(trained(mlp_head(D, H, C, batch_norm=True))).train()
    x, statistics = torch.randn(50, D), head[1].running_mean.clone()
    in_training = head(x)
    assert not head[1].training
    assert torch.equal(head[1].running_mean, statistics)
    assert torch.equal(in_training, head.eval()(x))


def test_modules_behind_the_last_linear_stay_as_they_are():
    head = freeze_in_place(HEADS["lightly's SimCLR projection"]()).train()
    statistics = head.layers[4].running_mean.clone()
    head(torch.randn(50, D))
    assert not torch.equal(head.layers[4].running_mean, statistics)
    assert head.layers[4].weight.requires_grad


@pytest.mark.parametrize("name", HEADS)
def test_to_mlp_is_plain_and_computes_the_same(name):
    mlp = trained(HEADS[name](), torch.float64)
    x = torch.randn(30, D, dtype=torch.float64)
    plain = freeze_structure(mlp).to_mlp()
    assert type(plain) is nn.Sequential
    assert relative_error(plain.eval()(x), mlp(x)) <= 1e-12


def test_to_mlp_without_batch_norm_is_bitwise_and_trainable():
    mlp, x = mlp_head(D, [H, 5], C), torch.randn(30, D)
    head = freeze_structure(mlp)
    plain = head.to_mlp()
    assert torch.equal(plain(x), mlp(x))
    assert all(p.requires_grad for p in plain.parameters())
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in head.parameters()}


@pytest.mark.parametrize("paths", ["tangent", "independent"])
def test_only_output_paths_go_back_to_an_mlp(paths):
    head = freeze_structure(mlp_head(D, H, C), paths=paths)
    with pytest.raises(ValueError, match="Expected `paths` to be 'output' to make an MLP"):
        head.to_mlp()
    with pytest.raises(ValueError, match="Expected `paths` to be 'output' to unfreeze"):
        unfreeze_in_place(head)


def test_unfreezing_gives_back_the_class_and_what_was_trainable():
    mlp = mlp_head(D, H, C)
    mlp[0].bias.requires_grad_(False)
    head = freeze_in_place(mlp)
    with torch.no_grad():
        head[2].weight.add_(1.0)
    x = torch.randn(5, D)
    expected = head(x)
    assert unfreeze_in_place(head) is mlp
    assert type(mlp) is nn.Sequential
    assert torch.equal(mlp(x), expected)
    assert [name for name, p in mlp.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_a_frozen_head_loads_strictly_into_the_plain_mlp_and_back():
    mlp = trained(mlp_head(D, H, C, batch_norm=True))
    head = freeze_structure(mlp)
    other = mlp_head(D, H, C, batch_norm=True).eval()
    other.load_state_dict(head.state_dict(), strict=True)
    x = torch.randn(20, D)
    assert torch.equal(other(x), head(x))
    again = freeze_structure(mlp_head(D, H, C, batch_norm=True)).eval()
    again.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(again(x), head(x))


@pytest.mark.parametrize("paths", PATHS)
def test_a_frozen_head_loads_the_weights_of_another_mlp_exactly(paths):
    head = freeze_structure(trained(mlp_head(D, [H, 5], C, batch_norm=True), torch.float64), paths=paths)
    other = trained(mlp_head(D, [H, 5], C, batch_norm=True), torch.float64)
    head.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(20, D, dtype=torch.float64)
    assert relative_error(head(x), other(x)) <= 1e-12


@pytest.mark.parametrize("paths", PATHS)
def test_the_mark_survives_a_weights_only_round_trip(paths):
    file = io.BytesIO()
    head = freeze_in_place(mlp_head(D, H, C), paths=paths, freeze_epoch=3)
    torch.save(head.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file, weights_only=True)
    assert state_dict._metadata[""]["glai"] == {"paths": paths, "epoch": 3}
    loaded = freeze_structure(mlp_head(D, H, C), paths=paths)
    loaded.load_state_dict(state_dict)
    x = torch.randn(9, D)
    assert torch.equal(loaded(x), head(x))
    assert loaded.freeze_epoch == 3


def test_loading_other_paths_says_so():
    head = freeze_structure(mlp_head(D, H, C))
    state_dict = freeze_structure(mlp_head(D, H, C), paths="tangent").state_dict()
    with pytest.raises(RuntimeError, match="Expected the state dict of a head frozen with 'output' paths"):
        head.load_state_dict(state_dict)


@pytest.mark.parametrize("paths", PATHS)
def test_frozen_heads_copy_and_pickle(paths):
    head = freeze_structure(mlp_head(D, H, C), paths=paths)
    x = torch.randn(9, D)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(x), head(x))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(x), head(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"paths": "all"}, ValueError, "Expected `paths` to be 'output', 'tangent' or 'independent', but got 'all'."),
        ({"paths": "independent", "max_paths": 100}, ValueError, f"but the head has {D * H * C + H * C + C}"),
    ],
)
def test_refusals_leave_the_head_as_it_was(arguments, error, message):
    mlp = mlp_head(D, H, C)
    with pytest.raises(error, match="Expected") as caught:
        freeze_in_place(mlp, **arguments)
    assert message in str(caught.value)
    assert all(p.requires_grad for p in mlp.parameters())


def test_freezing_twice_is_an_error():
    with pytest.raises(TypeError, match="frozen already"):
        freeze_structure(freeze_structure(mlp_head(D, H, C)))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((0, H, C), {}, "Expected `in_features` to be an integer of at least 1, but got 0."),
        ((D, 0, C), {}, "Expected `hidden_features` to be an integer of at least 1, but got 0."),
        ((D, [], C), {}, "at least one hidden layer, but got none"),
        ((D, H, 0), {}, "Expected `out_features` to be an integer of at least 1, but got 0."),
        ((D, H, C), {"dropout": 1.0}, "Expected `dropout` to be a finite number in [0, 1), but got 1.0."),
    ],
)
def test_mlp_head_refuses_sizes_that_make_no_head(sizes, options, message):
    with pytest.raises(ValueError, match="Expected") as caught:
        mlp_head(*sizes, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("sizes", [("8", H, C), (D, 1.5, C), (D, [H, None], C)])
def test_mlp_head_refuses_sizes_that_are_no_integers(sizes):
    with pytest.raises(TypeError, match="to be an integer of at least 1, but got"):
        mlp_head(*sizes)


def test_mlp_head_orders_its_modules():
    head = mlp_head(D, [H, 5], C, batch_norm=True, dropout=0.1)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(module) for module in head] == [*block, *block, nn.Linear]


def synchronised_and_back(head):
    """What Lightning does to the modules of a fit with ``sync_batchnorm=True``."""
    return TorchSyncBatchNorm().revert(torch.nn.SyncBatchNorm.convert_sync_batchnorm(head))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_a_head_follows_batch_norms_that_are_put_in_the_place_of_its_own(paths, nested):
    mlp = trained(nn.Sequential(nn.BatchNorm1d(D), *mlp_head(D, [H, 5], C, batch_norm=True), nn.BatchNorm1d(C)))
    head = freeze_structure(nn.Sequential(mlp) if nested else mlp, paths=paths)
    x = torch.randn(6, D)
    before = head.eval()(x)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(head).train()
    norms = [module for module in synchronised.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert [norm.training for norm in norms] == [False, False, False, True]
    head = synchronised_and_back(synchronised).eval()
    assert torch.equal(head(x), before)
    # Buffers are new tensors from here on, of the modules that are in the head.
    assert torch.allclose(head.double()(x.double()), before.double(), atol=1e-5)
    head.load_state_dict(freeze_structure(nn.Sequential(mlp) if nested else mlp, paths=paths).double().state_dict())


class Somebodys(nn.Module):
    """A head with a method, a flag, a second argument, and children whose names are those of a ``GLAIHead``."""

    def __init__(self):
        super().__init__()
        self.structure, self.layout, self.paths = nn.Linear(D, H), nn.ReLU(), nn.Linear(H, C)
        self.scale, self.calls = 1.0, 0

    def forward(self, x, scale=None):
        self.calls += 1
        z = self.paths(self.layout(self.structure(x)))
        return z if scale is None else z * scale

    def patterns(self):
        return "mine"


def test_methods_children_attributes_and_arguments_of_a_head_survive_the_freeze():
    mlp, x = Somebodys(), torch.randn(5, D)
    expected = mlp(x, scale=2.0)
    head = freeze_in_place(mlp)
    assert isinstance(head, Somebodys)
    assert isinstance(head, GLAIHead)
    assert head.patterns() == "mine"
    assert isinstance(head.structure, nn.Linear)
    assert isinstance(head.paths, nn.Linear)
    assert torch.equal(head(x, scale=2.0), expected)
    assert head.calls == 2
    assert head.num_paths == D * H * C + H * C + C
    assert torch.equal(copy.deepcopy(head)(x, scale=2.0), expected)
    assert head.calls == 2


class DropsAtTheEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x):
        z = self.last(torch.relu(self.first(x)))
        return nn.functional.dropout(z, 0.05, self.training)


def test_dropout_that_a_forward_calls_keeps_its_rate_and_stops_in_evaluation():
    mlp, x = DropsAtTheEnd(), torch.randn(400, D)
    expected = mlp.eval()(x)
    head = freeze_in_place(mlp)
    assert torch.equal(head.eval()(x), expected)
    dropped = (head.train()(x) == 0).float().mean()
    assert 0.02 < dropped < 0.1


class ScalesWhileItTrains(DropsAtTheEnd):
    def forward(self, x):
        z = self.last(torch.relu(self.first(x)))
        return nn.functional.relu(z) if self.training else z


def test_a_forward_that_depends_on_the_mode_goes_on_depending_on_it():
    mlp, x = ScalesWhileItTrains(), torch.randn(40, D)
    expected = mlp.train()(x), mlp.eval()(x)
    head = freeze_in_place(mlp)
    assert torch.equal(head.train()(x), expected[0])
    assert torch.equal(head.eval()(x), expected[1])


class WithoutGradients(DropsAtTheEnd):
    def forward(self, x):
        with torch.no_grad():
            h = torch.relu(self.first(x))
        return self.last(h)


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2.0


def hooked_head():
    head = mlp_head(D, H, C)
    head[1].register_forward_hook(lambda module, args, output: output * 2.0)
    return head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Somebodys, "got a forward with 2 arguments"),
        (DropsAtTheEnd, "its forward calls a dropout function after the last Linear"),
        (ScalesWhileItTrains, "its forward takes other steps in train mode than in eval mode"),
        (WithoutGradients, "its gradients reach other parameters"),
        (hooked_head, "got a hook on '1'"),
    ],
)
def test_where_no_formula_computes_what_the_forward_computes_tangent_paths_run_it_and_independent_are_refused(
    head, message
):
    head = head()
    with pytest.raises(ValueError, match="Expected a head that computes what the formula of") as caught:
        freeze_in_place(head, paths="independent")
    assert message in str(caught.value)
    x = torch.randn(20, D)
    assert relative_error(freeze_structure(head.eval(), paths="tangent")(x), head(x)) <= 1e-6
    assert not isinstance(head, GLAIHead)
    assert all(p.requires_grad for p in head.parameters())


def test_a_subclass_with_a_forward_of_its_own_runs_it_and_is_not_read_as_its_base():
    mlp, x = nn.Sequential(nn.Linear(D, H), OwnReLU(), nn.Linear(H, C)), torch.randn(20, D)
    for paths in ("output", "tangent"):
        assert relative_error(freeze_structure(mlp, paths=paths)(x), mlp(x)) <= 1e-6
    with pytest.raises(ValueError, match="but got `OwnReLU` at '1'"):
        freeze_structure(mlp, paths="independent")


def test_a_head_in_a_plain_list_is_frozen_too():
    mlp = mlp_head(D, H, C)
    kept = [mlp]
    freeze_in_place(mlp, paths="independent")
    kept[0](torch.randn(5, D)).sum().backward()
    assert [name for name, p in mlp.named_parameters() if p.grad is not None] == [
        "2.path_weights", "2.path_biases_0", "2.bias"
    ]  # fmt: skip


def test_what_is_put_into_a_frozen_head_is_used():
    head = freeze_in_place(mlp_head(D, H, C))
    x = torch.randn(5, D)
    head[2] = nn.Linear(H, 7)
    assert head(x).shape == (5, 7)
    assert head.num_paths == D * H * 7 + H * 7 + 7
    assert torch.allclose(head[2](head.path_activations(x)), head(x))


@pytest.mark.parametrize("paths", ["output", "tangent"])
def test_a_frozen_head_has_the_parameters_of_the_mlp_in_the_same_order(paths):
    mlp = mlp_head(D, H, C)
    teacher = copy.deepcopy(mlp)
    head = freeze_in_place(mlp, paths=paths)
    assert [name for name, _ in head.named_parameters()] == [name for name, _ in teacher.named_parameters()]
    assert all(a.shape == b.shape for a, b in zip(head.parameters(), teacher.parameters(), strict=True))


def test_references_of_tangent_paths_move_with_the_head():
    head = freeze_structure(mlp_head(D, H, C), paths="tangent").double()
    assert head(torch.randn(3, D, dtype=torch.float64)).dtype is torch.float64
    assert all(value.dtype is torch.float64 for value in head.state_dict().values())


def test_independent_paths_have_the_dtype_of_autocast():
    head = freeze_structure(mlp_head(D, [H, 5], C), paths="independent")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(3, D)).dtype is torch.bfloat16


def test_a_slice_of_a_frozen_sequential_is_a_plain_one():
    head, x = freeze_structure(mlp_head(D, H, C)), torch.randn(3, D)
    assert type(head[:2]) is nn.Sequential
    assert torch.equal(head[2](head[:2](x)), head(x))


@pytest.mark.parametrize("paths", PATHS)
def test_unfreezing_with_weights_keeps_dtypes(paths):
    mlp = mlp_head(D, H, C).to(torch.bfloat16)
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    unfreeze_in_place(freeze_in_place(mlp, paths=paths), before)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert {value.dtype for value in mlp.state_dict().values()} == {torch.bfloat16}


class Around(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), head

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class CountsRuns:
    """A backend of ``torch.compile`` that runs graphs as they are, and counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("outer", [False, True])
def test_a_compiled_head_that_is_watched_runs_compiled_before_and_after_the_freeze(outer, paths):
    torch._dynamo.reset()
    head, backend = FunctionalHead(), CountsRuns()
    module = Around(head) if outer else head
    module.compile(backend=backend)
    probe = ChurnProbe(head, probe_size=64)
    x = torch.randn(32, D)
    for _ in range(20):
        module(x).sum().backward()
    assert backend.runs >= 20
    assert probe.seen == 20 * 32
    assert probe.measure()[1] == 64 * H
    probe.close()
    freeze_in_place(head, paths=paths)
    before = backend.runs
    for _ in range(20):
        module(x).sum().backward()
    assert backend.runs - before >= 20
