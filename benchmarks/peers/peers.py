"""Each peer as its documentation uses it. A function returns the cases of one package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model as m
import torch
from model import ROWS, SIDE, TOTAL, Case
from torch import Tensor

SLOW = 512  # the smaller k of the dense projections, which are too slow for nine rounds


def references() -> Iterator[Case]:
    yield Case("forward", m.forward())
    yield Case("training step", m.training_step(), "every weight gradient, no optimizer")
    yield Case("floor", m.floor(), "forward and activation backward, no weight gradients")
    yield Case("plain torch, factored", m.factored_torch(), "autograd functions, one bmm a linear")


def u2a() -> Iterator[Case]:
    from u2a.batch import Row
    from u2a.index import Kronecker, Sketch, capture, pack

    rows = [Row(str(i), (), tuple(ids)) for i, ids in enumerate(m.make_ids().tolist())]

    def case(name: str, spec: Any) -> Iterator[Case]:
        model = m.make_model()
        m.train_only_linears(model)
        with capture(model, spec) as run:  # open over all batches: projections are made once
            call = lambda: run.features(pack(rows), lambda lp: -lp.sequence())  # noqa: E731
            yield Case(name, call, "runs gelu_new as one operation")

    yield from case("u2a Kronecker 16x16", Kronecker(SIDE, SIDE))
    yield from case("u2a Sketch 1024", Sketch(TOTAL // 4))
    yield from case("u2a Sketch 4096", Sketch(TOTAL))


def bergson() -> Iterator[Case]:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from datasets import Dataset

    model = m.make_model().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as its own worker does
    data = Dataset.from_dict({"input_ids": m.make_ids().tolist()})
    folder, batches = Path(tempfile.mkdtemp()), [list(range(ROWS))]

    def config(name: str, **options: Any) -> dict[str, Any]:
        cfg = IndexConfig(run_path=str(folder / name), drop_columns=False, **options)
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        return {"cfg": cfg, "processor": GradientProcessor(**options)}

    def in_memory(name: str, **options: Any):
        arguments = config(name, **options)

        def call() -> dict[str, Tensor]:
            collector = InMemoryCollector(model=model.base_model, data=data, **arguments)
            CollectorComputer(
                model, data, collector=collector, batches=batches, cfg=arguments["cfg"]
            ).run_with_collector_hooks()
            return collector.gradients

        return call

    def on_disk():
        arguments = config("disk", projection_dim=SIDE)

        def call() -> Tensor:
            collect_gradients(model, data, batches=batches, **arguments)
            stored = arguments["cfg"].partial_run_path / "gradients.bin"
            return torch.from_file(str(stored), size=stored.stat().st_size // 4).view(ROWS, -1)

        return call

    one_sided = dict(projection_dim=TOTAL, projection_target="global")
    yield Case("bergson", in_memory("memory", projection_dim=SIDE), "InMemoryCollector")
    yield Case("bergson, to disk", on_disk(), "collect_gradients")
    yield Case("bergson, global", in_memory("global", **one_sided), "dense projection", slow=True)


def dattri() -> Iterator[Case]:
    from dattri.algorithm.factgrass import FactGraSSAttributor
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    ids = m.make_ids()
    loader = DataLoader([{"input_ids": row} for row in ids], batch_size=ROWS)

    def loss(model, batch, device):
        return m.losses(model(**batch).logits, batch["input_ids"]).sum()

    def case(name: str, method: Any, note: str) -> Case:
        model = m.make_model()
        attributor = method(
            AttributionTask(loss, model, model.state_dict()),
            layer_names=list(m.linears(model)),
            hessian="Identity",
            proj_dim=SIDE * SIDE,
            offload="none",
            cache_dir=tempfile.mkdtemp(),
        )

        def call() -> Tensor:
            attributor.cache(loader)
            return attributor.offload_manager.cached_gradients[0]

        return Case(name, call, note)

    yield case("dattri LoGra", LoGraAttributor, "cache(), biases as a column of the weight")
    yield case("dattri FactGraSS", FactGraSSAttributor, "its second stage is dense on a CPU")


def logix() -> Iterator[Case]:
    import logix
    from logix.config import LoRAConfig

    folder, ids = Path(tempfile.mkdtemp()), m.make_ids()
    model = m.make_model()
    (folder / "config.yaml").write_text(f"root_dir: {folder}\n")
    run = logix.init("peers", config=str(folder / "config.yaml"))
    run.watch(model, name_filter=list(m.linears(model)))
    run.add_lora(lora_config=LoRAConfig(rank=SIDE))
    run.setup({"grad": ["log"]})
    names = [str(i) for i in range(ROWS)]

    def call() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with run(data_id=names):
            m.losses(model(input_ids=ids).logits, ids).sum().backward()
        return {name: log["grad"] for name, log in run.get_log()[1].items()}

    yield Case("logix LoGra", call, "log of gradients, kept in memory")


def traker() -> Iterator[Case]:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Loss(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model, weights, buffers, ids):
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            logits = torch.func.functional_call(model, (weights, buffers), (), inputs).logits
            return m.losses(logits, ids[None]).sum()

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    ids = m.make_ids()
    names = [f"{name}.weight" for name in m.linears(m.make_model())]

    def case(k: int) -> Case:
        model = m.make_model()
        model.config._attn_implementation = "eager"  # vmap
        tracer = TRAKer(
            model=model, task=Loss(), train_set_size=ROWS, save_dir=tempfile.mkdtemp(),
            device="cpu", use_half_precision=False, grad_wrt=names, logging_level=30,
            proj_dim=k,
        )  # fmt: skip
        tracer.load_checkpoint(model.state_dict(), model_id=0)

        def call() -> Tensor:
            tracer.saver.current_store["is_featurized"][:] = 0
            tracer.featurize([ids], inds=torch.arange(ROWS).numpy())
            return torch.from_numpy(tracer.saver.current_store["grads"][:])

        held = tracer.projector.proj_matrix.nbytes >> 20
        note = f"dense, BasicProjector ({held} MB more held by it), eager attention"
        return Case(f"TRAK, k = {k}", call, note, slow=True)

    yield case(SLOW)
    yield case(TOTAL)


def opacus() -> Iterator[Case]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule

    model, ids = m.make_model(), m.make_ids()
    m.train_only_linears(model)  # tied and position embeddings are not covered by its norms
    wrapped = GhostModule(model, loss_reduction="sum", strict=False)

    def call() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        m.losses(wrapped(input_ids=ids).logits, ids).sum().backward()
        return wrapped.get_norm_sample()[:, None]

    yield Case("opacus ghost norms", call, "norms only: one number an example")


GROUPS = dict(
    references=references, u2a=u2a, bergson=bergson, dattri=dattri, logix=logix, opacus=opacus,
    traker=traker,
)  # fmt: skip
