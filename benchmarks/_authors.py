"""One outer step as the U2A authors' public code takes it, and at our quality without us.

Their procedure (muyiahhh/U2A, described in words; every line here is our own): the DPO loss's
gradient is accumulated over batches of preference pairs, policy and reference by full logits; then
every candidate alone, forward and backward, its flat gradient dotted with that of the DPO loss.
"""

import copy
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from u2a.batch import collate
from u2a.curvature import Curvature
from u2a.tree import trainable, unflatten


class Authors:
    """Scores delta_i = <grad L_J, grad l_i> / gamma, l_i minus the candidate's mean token NLL."""

    def __init__(self, model, beta=0.3, batch=8, gamma=1.0):
        self.model, self.beta, self.batch, self.gamma = model, beta, batch, gamma
        self.params = list(trainable(model).values())
        self.peft = hasattr(model, "disable_adapter")
        self.frozen = None if self.peft else copy.deepcopy(model).requires_grad_(False)

    def sequence(self, model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        logp = F.log_softmax(logits, -1).gather(2, batch.ids[:, 1:, None])[..., 0]
        return (logp * batch.answer[:, 1:]).sum(1)

    @torch.no_grad()
    def reference(self, batch):
        if not self.peft:
            return self.sequence(self.frozen, batch)
        with self.model.disable_adapter():
            return self.sequence(self.model, batch)

    def direction(self, pairs):
        """Flat gradient of the DPO loss, the sum of the batches' means."""
        flat = torch.zeros(sum(p.numel() for p in self.params), device=self.params[0].device)
        for i in range(0, len(pairs), self.batch):
            part = pairs[i : i + self.batch]
            margins = 0
            for sign, rows in ((1, [p.chosen for p in part]), (-1, [p.rejected for p in part])):
                batch = collate(rows).to(flat.device)
                margins = margins + sign * (
                    self.sequence(self.model, batch) - self.reference(batch)
                )
            flat += self.flat(-F.logsigmoid(self.beta * margins).mean())
        return flat

    def flat(self, loss):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, self.params)])

    def scores(self, rows, direction):
        found = []
        for row in rows:
            ids = torch.tensor([row.prompt_ids + row.answer_ids], device=direction.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
            start = len(row.prompt_ids)
            nll = F.cross_entropy(logits[start - 1 : -1], ids[0, start:])
            found.append(torch.dot(direction, self.flat(-nll)) / self.gamma)
        return torch.stack(found)


@contextmanager
def eager(model):
    """Attention whose backward can be differentiated."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


class DoubleBackward(Curvature):
    """Gauss-Newton products of the pooled NLL of `batches` by two backwards: J v as the derivative
    of u -> J^T u, then J^T (diag p - p p^T) J v."""

    probes = 0

    def __init__(self, model, batches):
        self.model, self.batches = model, batches
        self.params = trainable(model)
        self.tokens = sum(int(b.answer.sum()) for b in batches)

    @property
    def like(self):
        return self.params

    def matvec(self, v):
        flat = 0
        with eager(self.model), torch.enable_grad():
            for batch in self.batches:
                flat = flat + self._product(batch.to(next(iter(v.values())).device), v)
        return unflatten(flat, v)

    def _product(self, batch, v):
        params = list(self.params.values())
        logits = self.model(input_ids=batch.ids, use_cache=False).logits
        row, t = batch.answer.nonzero(as_tuple=True)
        z = logits[row, t - 1]
        u = torch.zeros_like(z, requires_grad=True)
        first = torch.autograd.grad(z, params, u, create_graph=True)
        (along,) = torch.autograd.grad(first, u, [v[n] for n in self.params], retain_graph=True)
        p = z.detach().softmax(-1)
        bent = p * (along - (p * along).sum(-1, keepdim=True)) / self.tokens
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(z, params, bent)])
