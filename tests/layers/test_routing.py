"""record_routing: which experts tokens are sent to, and how many of the choices change under the noise."""

import contextlib
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from alp_kernels import RouterNotRecognised, Routing, attach, record_routing  # noqa: E402
from alp_kernels.layers.routing import LayerChanges  # noqa: E402
from tests.support.architectures import ARCHITECTURES  # noqa: E402
from tests.support.decoders import VOCAB, ids, make_model  # noqa: E402
from tests.support.examine import available, hooks, make  # noqa: E402

MOE = [name for name in ARCHITECTURES if "MoE" in ARCHITECTURES[name].kind or "moe" in name]
DENSE = [name for name in ARCHITECTURES if name not in MOE and "image" not in name]
HIDDEN = {  # versions of transformers in which a model's choice does not show
    "aria_text": "5.0",  # its experts lie deeper
    "ernie4_5_moe": "5.0",  # a module of biases beside the router changes its scores
}


def made(name):
    if not available(name) or transformers.__version__ < HIDDEN.get(name, ""):
        pytest.skip(f"transformers {transformers.__version__}")
    model = make(ARCHITECTURES[name])
    for module in model.modules():  # some models' routers begin at 0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
    return model


def recorded(model, inputs, scope=None, path=None):
    with torch.no_grad(), scope or contextlib.nullcontext(), record_routing(model, path) as routing:
        model(**inputs)
    return routing


def brute_force(clean, noisy):
    """The three figures from sets, token by token."""
    pairs = [
        [(set(a), set(b)) for a, b in zip(clean[path].tolist(), noisy[path].tolist(), strict=True)] for path in clean
    ]
    changed = [[a != b for a, b in layer] for layer in pairs]
    num = sum(map(len, changed))
    tokens = sum(any(token) for token in zip(*changed, strict=True)) / len(changed[0])
    return sum(map(sum, changed)) / num, tokens, sum(len(a & b) / len(a) for layer in pairs for a, b in layer) / num


@pytest.mark.parametrize("name", MOE)
def test_routers_are_found_by_structure(name):
    """In every MoE architecture: nothing changes between two clean forwards, and noise as large as the input changes some."""
    architecture, model = ARCHITECTURES[name], made(name)
    inputs = architecture.inputs()
    clean, again = recorded(model, inputs), recorded(model, inputs)
    assert (same := clean.changes(again)).changed_frac == same.tokens_changed_frac == 0.0
    assert same.overlap == 1.0 and same.num_tokens == inputs["input_ids"].numel()
    with attach(model, 1.0, scale="rms") as handle:
        noisy = recorded(model, inputs, handle.perturbed(step=0))
    found = clean.changes(noisy)
    assert found[1:4] == pytest.approx(brute_force(clean.experts, noisy.experts))
    assert 0 < found.changed_frac <= found.tokens_changed_frac <= 1 and 0 <= found.overlap < 1
    for experts in clean.experts.values():
        assert experts.min() >= 0 and experts.max() < 5 and experts.shape[1] <= 2
        assert all(len(set(row)) == len(row) for row in experts.tolist())


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_records_nothing(name):
    architecture, model = ARCHITECTURES[name], made(name)
    routing = recorded(model, architecture.inputs(), path=architecture.path)
    assert routing.experts == {} and routing.changes(routing) is None


# ------------------------------------------------------------------ what is recorded is what the experts compute with

KINDS = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8},
    "gpt_oss": {},
    "llama4_text": {},
}


def tiny(name, **changes):
    if not available(name):
        pytest.skip(f"transformers {transformers.__version__}")
    architecture = ARCHITECTURES[name]
    return make(architecture._replace(config=architecture.config | KINDS.get(name, {}) | changes))


@pytest.mark.parametrize("name", [n for n in KINDS if n != "llama4_text"])
def test_the_record_is_what_the_experts_are_called_with(name):
    if transformers.__version__ < "5":
        pytest.skip("the experts are called one by one")
    model, given = tiny(name), []
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    for module in experts:
        module.register_forward_pre_hook(
            lambda m, args, kwargs: given.append(args[1].sort(-1).values), with_kwargs=True
        )
    routing = recorded(model, {"input_ids": ids()})
    assert len(given) == len(routing.experts) > 0
    for a, b in zip(given, routing.experts.values(), strict=True):
        assert torch.equal(a, b.long().sort(-1).values)


def test_scores_without_indices_are_ranked():
    """Llama 4's router returns scores alone; the experts with a score other than 0 are those chosen."""
    model = tiny("llama4_text")
    scores = []
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda m, args, out: scores.append(out[0]))
    routing = recorded(model, {"input_ids": ids()})
    for is_chosen, experts in zip([s > 0 for s in scores], routing.experts.values(), strict=True):
        assert is_chosen.sum() == experts.numel() and is_chosen.gather(1, experts.long()).all()


def test_groups_bound_the_choice():
    """DeepSeek-V3 chooses within one of two groups of experts: the record knows, where ranking its logits would not."""
    experts = next(iter(recorded(tiny("deepseek_v3"), {"input_ids": ids()}).experts.values()))
    assert all(len({e // 4 for e in row}) == 1 for row in experts.tolist())


# ------------------------------------------------------------------ the noise


@pytest.mark.parametrize("name", KINDS)
def test_tiny_noise_changes_nothing_and_more_noise_changes_more(name):
    model, inputs = tiny(name), {"input_ids": ids(8, 16)}
    clean, fractions = recorded(model, inputs), []
    for sigma in (1e-12, 0.05, 1.0):
        with attach(model, sigma, scale="rms") as handle:
            fractions.append(clean.changes(recorded(model, inputs, handle.perturbed(step=0))).changed_frac)
    assert fractions[0] == 0.0 < fractions[1] < fractions[2]


@pytest.mark.parametrize("layers", ["final", "logits", [-1]])
def test_noise_behind_the_last_router_changes_nothing(layers):
    """The last decoder layer is dense here, so noise on its input reaches no router."""
    model = tiny("qwen3_moe", mlp_only_layers=[1])
    inputs = {"input_ids": ids()}
    clean = recorded(model, inputs)
    with attach(model, 1.0, layers=layers) as handle:
        noisy = recorded(model, inputs, handle.perturbed(step=0))
    assert list(clean.experts) == ["model.layers.0.mlp"] and clean.changes(noisy).tokens_changed_frac == 0.0


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputed_layers_are_recorded_once(mode, reentrant):
    model = getattr(tiny("qwen3_moe"), mode)()
    plain = recorded(model, {"input_ids": ids()})
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with attach(model, 1.0) as handle:
        for switched in (contextlib.nullcontext(), handle.perturbed(step=0)):
            with switched, record_routing(model) as routing:
                for _ in range(2):
                    model(input_ids=ids()).logits.sum().backward()
            assert [len(experts) for experts in routing.experts.values()] == [2 * ids().numel()] * 2
            if isinstance(switched, contextlib.nullcontext):
                assert all(torch.equal(e[:10], plain.experts[path]) for path, e in routing.experts.items())


def test_compiled_forwards_are_recorded():
    """A graph compiled before the scope would not run its hooks."""
    model = tiny("mixtral").eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=ids())
    experts = recorded(compiled, {"input_ids": ids()}).experts
    plain = recorded(model, {"input_ids": ids()}).experts
    assert len(experts) == 2
    for a, b in zip(experts.values(), plain.values(), strict=True):
        assert torch.equal(a, b)


def test_adapters_on_the_experts_are_no_blocks_of_their_own():
    peft = pytest.importorskip("peft")
    if transformers.__version__ < "5":
        pytest.skip("the experts are linear layers")
    model = tiny("qwen3_moe")
    plain = recorded(model, {"input_ids": ids()}).experts
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    found = recorded(adapted, {"input_ids": ids()}).experts
    assert list(found) == [f"base_model.model.{path}" for path in plain]
    for a, b in zip(found.values(), plain.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fails", [False, True])
def test_the_scope_leaves_the_model_as_it_was(fails):
    model = tiny("qwen3_moe")
    before = hooks(model)
    state, rows = {k: v.clone() for k, v in model.state_dict().items()}, {"input_ids": ids()}
    with torch.no_grad():
        logits = model(**rows).logits
    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), record_routing(model):
        assert hooks(model) != before
        model(**rows)
        if fails:
            raise KeyError
    assert hooks(model) == before and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**rows).logits, logits)


# ------------------------------------------------------------------ replayed routing


class Replay(nn.Module):
    """In place of a router: a fixed choice of experts, as an inference engine recorded it, weighted by the router's scores."""

    def __init__(self, router, experts):
        super().__init__()
        self.router, self.indices = router, experts.long()

    def forward(self, hidden):
        logits = self.router(hidden)[0]
        return logits, logits.float().softmax(-1).gather(1, self.indices).to(hidden.dtype), self.indices


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_with_replayed_routing_nothing_changes_under_the_noise(name):
    if transformers.__version__ < "5":
        pytest.skip("routers return no logits, weights and indices")
    model, inputs = tiny(name), {"input_ids": ids(4, 16)}
    recording = recorded(model, inputs)
    for path, experts in recording.experts.items():
        block = model.get_submodule(path)
        for child, router in list(block.named_children()):
            if child in ("gate", "router"):
                setattr(block, child, Replay(router, experts))
    with attach(model, 0.3) as handle:
        clean = recorded(model, inputs)
        noisy = recorded(model, inputs, handle.perturbed(step=0))
        with torch.no_grad():
            quiet = model(**inputs).logits.log_softmax(-1)
            with handle.perturbed(step=0):
                shift = (model(**inputs).logits.log_softmax(-1) - quiet).abs().mean()
    assert clean.experts.keys() == recording.experts.keys()
    assert recording.changes(clean).tokens_changed_frac == clean.changes(noisy).tokens_changed_frac == 0.0
    assert clean.changes(noisy).overlap == 1.0 and shift > 0.01


class Buffered(nn.Module):
    """A router that returns its choice in the same int32 memory each time."""

    def __init__(self, router, experts):
        super().__init__()
        self.router, self.indices = router, experts.clone()

    def forward(self, hidden):
        logits, weights, chosen = self.router(hidden)
        self.indices.copy_(chosen)
        return logits, weights, self.indices


def test_a_router_may_reuse_the_memory_of_its_choice():
    if transformers.__version__ < "5":
        pytest.skip("routers return no logits, weights and indices")
    model = tiny("qwen3_moe")
    first, second = ({"input_ids": rows} for rows in ids(8, 5).split(4))
    recording = recorded(model, first)
    for path, experts in recording.experts.items():
        block = model.get_submodule(path)
        block.gate = Buffered(block.gate, experts)
    parts = [recorded(model, inputs).experts for inputs in (first, second)]
    with torch.no_grad(), record_routing(model) as both:
        for inputs in (first, second):
            model(**inputs)
    for path, rows in both.experts.items():
        assert torch.equal(rows, torch.cat([part[path] for part in parts]))


# ------------------------------------------------------------------ the figures


def routing(**experts):
    found = Routing()
    found.experts = {name: torch.tensor(rows, dtype=torch.int32) for name, rows in experts.items()}
    return found


def test_the_figures_of_a_small_example():
    """Order within a token's experts does not count, and the mask leaves tokens out."""
    clean = routing(one=[[0, 1], [2, 3], [4, 5]], two=[[0], [1], [2]])
    noisy = routing(one=[[1, 0], [2, 4], [0, 1]], two=[[0], [1], [3]])
    found = clean.changes(noisy)
    assert found.num_tokens == 3 and found.changed_frac == pytest.approx(3 / 6)
    assert found.tokens_changed_frac == pytest.approx(2 / 3)
    assert found.overlap == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert found.layers == {"one": LayerChanges(2 / 3, 0.5), "two": LayerChanges(1 / 3, 2 / 3)}
    assert clean.changes(noisy, torch.tensor([[1, 1, 0]]))[:4] == (2, 0.25, 0.5, pytest.approx(3.5 / 4))
    assert clean.changes(noisy, torch.zeros(3))[:3] == (0, 0.0, 0.0)


def test_forwards_of_one_scope_are_joined():
    model, rows = tiny("qwen3_moe"), ids(4, 5)
    with torch.no_grad(), record_routing(model) as split:
        for part in rows.split(2):
            model(input_ids=part)
    whole = recorded(model, {"input_ids": rows})
    assert whole.changes(split)[:3] == (20, 0.0, 0.0)


# ------------------------------------------------------------------ what cannot be measured is said


class Moe(nn.Module):
    """A mixture of four experts whose router is a plain linear layer, as older models have it."""

    def __init__(self, top_k=2, bias=False, twice=False):
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("correction", torch.tensor([9.0, 0.0, 0.0, 0.0]) if bias else None)
        self.other = nn.Linear(16, 4) if twice else nn.Identity()
        self.top_k = top_k

    def forward(self, hidden):
        scores = self.gate(hidden)
        self.other(hidden)
        weights, experts = (scores if self.correction is None else scores + self.correction).topk(self.top_k)
        stack = torch.stack([expert(hidden) for expert in self.experts], -2)
        return hidden + (weights[..., None] * stack.gather(-2, experts[..., None].expand(*experts.shape, 16))).sum(-2)


class OwnModel(nn.Module):
    def __init__(self, config=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": Moe(**options)}) for _ in range(2))
        for layer in self.layers:
            layer.forward = layer["moe"].forward
        self.config = config

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer["moe"](hidden)
        return hidden


FOUR = types.SimpleNamespace(num_experts=4)


@pytest.mark.parametrize("config", [None, FOUR])
def test_a_plain_linear_router_is_ranked_with_or_without_a_config(config):
    model = OwnModel(config)
    experts = recorded(model, {"input_ids": ids()}).experts
    chosen = model.layers[0]["moe"].gate(model.embed(ids())).topk(2).indices.flatten(0, 1)
    assert list(experts) == ["layers.0.moe", "layers.1.moe"] and torch.equal(experts["layers.0.moe"].long(), chosen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": True}, "layers.0.moe.gate returns scores, but correction may change"),
        ({"twice": True}, "gate and other of layers.0.moe all look like its router"),
        (
            {"top_k": 2, "config": types.SimpleNamespace(num_experts=8)},
            "has 8 experts, but none of its decoder layers holds",
        ),
    ],
)
def test_a_router_that_cannot_be_read_is_an_error_and_not_a_zero(options, words):
    model = OwnModel(**{"config": FOUR} | options)
    before = hooks(model)
    found = recorded(model, {"input_ids": ids()})
    with pytest.raises(RouterNotRecognised, match=words):
        found.changes(found)
    assert found.experts == {} and hooks(model) == before


def test_a_router_without_a_number_of_experts_is_an_error():
    model = OwnModel(FOUR)
    for layer in model.layers:
        layer["moe"].forward = types.MethodType(
            lambda self, hidden: self.gate(hidden).sum(-1, keepdim=True) + hidden, layer["moe"]
        )
        del layer["moe"].top_k
    found = recorded(model, {"input_ids": ids()})
    with pytest.raises(RouterNotRecognised, match=r"layers.0.moe holds 4 experts, but nothing in it returns"):
        found.changes(found)


def test_a_scope_without_a_forward_is_an_error():
    with pytest.raises(RuntimeError, match=r"no layer of model\.layers ran"), record_routing(make_model("Mixtral")):
        pass


def test_scopes_of_other_tokens_or_models_are_not_compared():
    model = tiny("qwen3_moe")
    one, other = recorded(model, {"input_ids": ids(2, 5)}), recorded(model, {"input_ids": ids(2, 6)})
    with pytest.raises(ValueError, match=r"recorded experts \(10, 2\) and \(12, 2\)"):
        one.changes(other)
    with pytest.raises(ValueError, match="only one of the two scopes recorded model"):
        one.changes(Routing())
    with pytest.raises(ValueError, match=r"mask has 9 values; it needs 10"):
        one.changes(one, torch.ones(9))
