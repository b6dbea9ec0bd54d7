"""A regression suite of planted bugs: small models, each wrong in one way, and the check that must find it, and where.

`CATALOGUE` is a list of `Bug`. Most are a right model, `ViT` or `Decoder`, with one part replaced by a wrong one.

These bugs and the detector have one author, so that all of them are found says nothing about bugs that nobody thought
of. For that there is a place for held-out bugs, `held_out_bugs.py`, with the same interface: a list `CATALOGUE` of
`Bug`. It is written from bugs reported elsewhere, by somebody who does not look at the detector, each with `right`, the
corrected model. The detector is never changed for a held-out bug: a bug that led to a change moves to this file.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS, CLASSES = 32, 4, 5

# ---- the right model -------------------------------------------------------------------------------------------------

def lower(scores): return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()

class Attention(nn.Module):
    "Multi-head self-attention, in steps that a bug can replace one by one"
    def __init__(self, dim=DIM, n_heads=HEADS, causal=False):
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.qkv, self.proj = nn.Linear(dim, 3*dim), nn.Linear(dim, dim)
    def split(self, x):
        b, n, d = x.shape
        return x.reshape(b, n, self.n_heads, d//self.n_heads).transpose(1, 2)
    def merge(self, x): return x.transpose(1, 2).flatten(2)
    def scale(self, q): return q.shape[-1]**-.5
    def mask(self, scores):
        if not self.causal: return scores
        return scores.masked_fill(~lower(scores), -torch.inf)
    def weights(self, scores): return self.mask(scores).softmax(-1)
    def attend(self, q, k, v): return self.weights(q @ k.transpose(-2, -1) * self.scale(q)) @ v
    def forward(self, x):
        q, k, v = (self.split(t) for t in self.qkv(x).chunk(3, -1))
        return self.proj(self.merge(self.attend(q, k, v)))

class MLP(nn.Module):
    "Feed-forward layer"
    def __init__(self, dim=DIM):
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, 2*dim), nn.GELU()
        self.drop, self.fc2 = nn.Dropout(.1), nn.Linear(2*dim, dim)
    def forward(self, x): return self.fc2(self.drop(self.act(self.fc1(x))))

class Block(nn.Module):
    "Pre-norm encoder layer"
    def __init__(self, attn=Attention, mlp=MLP):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(DIM), attn(), nn.LayerNorm(DIM), mlp()
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class Embed(nn.Module):
    "Patches, class token, positions"
    def __init__(self, size=16, patch=4):
        super().__init__()
        self.proj = nn.Conv2d(1, DIM, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, DIM)*.02)
        self.pos = nn.Parameter(torch.randn(1, (size//patch)**2 + 1, DIM)*.02)
    def patches(self, x): return self.proj(x).flatten(2).transpose(1, 2)
    def forward(self, x):
        x = self.patches(x)
        return torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos

class Pool(nn.Module):
    "Mean over the tokens"
    def forward(self, x): return x.mean(1)

class ClassToken(nn.Module):
    "The class token's output"
    def forward(self, x): return x[:, 0]

class ViT(nn.Module):
    "A small Vision Transformer, right unless a part is replaced"
    def __init__(self, attn=Attention, mlp=MLP, embed=Embed, pool=Pool, block=Block, head=nn.Linear, depth=2):
        super().__init__()
        self.embed = embed()
        self.blocks = nn.Sequential(*(block(attn, mlp) for _ in range(depth)))
        self.norm, self.pool, self.head = nn.LayerNorm(DIM), pool(), head(DIM, CLASSES)
    def forward(self, x): return self.head(self.pool(self.norm(self.blocks(self.embed(x)))))

class Positions(nn.Module):
    "Adds a fixed table of positions to tokens (b n d)"
    def __init__(self, n=32):
        super().__init__()
        angle = torch.arange(n)[:, None] * torch.exp(torch.arange(0, DIM, 2) * (-math.log(1e4)/DIM))
        self.register_buffer('pe', torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
    def forward(self, x): return x + self.pe[:x.shape[1]]

class CausalBlock(Block):
    def __init__(self, attn, mlp):
        super().__init__(attn, mlp)
        self.attn.causal = True

class Decoder(nn.Module):
    "A small causal language model over 11 tokens"
    def __init__(self, attn=Attention, mlp=MLP, pos=Positions, block=CausalBlock, depth=2):
        super().__init__()
        self.embed, self.pos = nn.Embedding(11, DIM), pos()
        self.blocks = nn.Sequential(*(block(attn, mlp) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 11)
    def forward(self, x): return self.head(self.norm(self.blocks(self.pos(self.embed(x)))))

class PaddedEncoder(nn.Module):
    "Tokens (b n) and keep (b n), False at padding -> logits; the mean is taken over the real tokens"
    def __init__(self):
        super().__init__()
        self.embed, self.pos = nn.Embedding(11, DIM), Positions()
        self.layer = nn.TransformerEncoderLayer(DIM, HEADS, 2*DIM, batch_first=True)
        self.head = nn.Linear(DIM, CLASSES)
    def hide(self, keep): return ~keep    # torch wants True where a key is hidden
    def forward(self, x, keep):
        x = self.layer(self.pos(self.embed(x)), src_key_padding_mask=self.hide(keep))
        return self.head((x*keep[..., None]).sum(1) / keep.sum(1, keepdim=True))

class SequenceFirst(nn.Module):
    "Torch's attention in its own order (n b d), rightly: transposed before and after"
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS)
    def forward(self, x):
        x = x.transpose(0, 1)
        return self.mha(x, x, x, need_weights=False)[0].transpose(0, 1)

# ---- inputs ----------------------------------------------------------------------------------------------------------

def images():
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return dict(x=x, y=torch.tensor([0, 3, 1, 2]))
def token_ids(): return dict(x=torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1)))
def tokens(): return dict(x=torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(1)))
def causal_ids(): return token_ids() | dict(causal=True)
def padded_ids():
    keep = torch.arange(9) < torch.tensor([9, 6, 5, 8])[:, None]
    return dict(x=(token_ids()['x'], keep), mask=keep)

# ---- the bugs: attention ---------------------------------------------------------------------------------------------

class TorchAttention(nn.MultiheadAttention):
    "torch's attention as the article calls it: on (b n d), with batch_first left at False"
    def __init__(self, **kw): super().__init__(DIM, HEADS, **kw)
    def forward(self, x): return super().forward(x, x, x, need_weights=False)[0]

class DetachedQK(TorchAttention):
    "The article's cure, on a rightly built attention"
    def __init__(self): super().__init__(batch_first=True)
    def forward(self, x):
        y = x.clone().detach()
        return nn.MultiheadAttention.forward(self, y, y, x, need_weights=False)[0]

class ReshapedForTorch(nn.Module):
    "(n b d) is what torch's attention wants, and a reshape gives that shape"
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS)
    def forward(self, x):
        b, n, d = x.shape
        y = x.reshape(n, b, d)
        return self.mha(y, y, y, need_weights=False)[0].reshape(b, n, d)

class SplitByView(Attention):
    def split(self, x): return x.reshape(x.shape[0], self.n_heads, x.shape[1], -1)

class MergedByView(Attention):
    def merge(self, x): return x.reshape(x.shape[0], x.shape[2], -1)

class NeverTransposed(Attention):
    def split(self, x): return x.reshape(*x.shape[:2], self.n_heads, -1)
    def merge(self, x): return x.flatten(2)

class SoftmaxOverBatch(Attention):
    def weights(self, scores): return scores.softmax(0)

class SoftmaxOverQueries(Attention):
    def weights(self, scores): return scores.softmax(-2)

class SoftmaxOverHeads(Attention):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=1)
    def weights(self, scores): return self.softmax(scores)

class ScaledAfter(Attention):
    "The article's own attention: softmax first, then the division, by the root of the whole width"
    def attend(self, q, k, v):
        weights = F.softmax(torch.einsum('bhqd,bhkd->bhqk', q, k), dim=-1) / DIM**.5
        return torch.einsum('bhqk,bhkd->bhqd', weights, v)

class ScaledByWidth(Attention):
    def scale(self, q): return DIM**-.5

class NotScaled(Attention):
    def scale(self, q): return 1.

class ScaledTwice(Attention):
    def attend(self, q, k, v): return F.scaled_dot_product_attention(q*self.scale(q), k, v)

class MaskedAfter(Attention):
    def weights(self, scores): return scores.softmax(-1) * lower(scores)

class MaskDropped(Attention):
    "masked_fill returns a copy, which nobody takes"
    def mask(self, scores):
        scores.masked_fill(~lower(scores), torch.finfo(scores.dtype).min)
        return scores

class MaskInverted(Attention):
    def mask(self, scores): return scores.masked_fill(lower(scores), torch.finfo(scores.dtype).min)

class MaskInvertedInf(Attention):
    "The last query sees no key at all, and the softmax of nothing is NaN"
    def mask(self, scores): return scores.masked_fill(lower(scores), -torch.inf)

class MaskOneTooFar(Attention):
    def mask(self, scores):
        return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(1), -torch.inf)

class DataSoftmax(Attention):
    "A softmax by hand that normalises behind autograd's back"
    def weights(self, scores):
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        e.data /= e.data.sum(-1, keepdim=True)
        return e

class SoftmaxInPlace(Attention):
    "exp keeps its output for the backward pass; dividing that in place makes the backward pass fail"
    def weights(self, scores):
        e = scores.exp()
        e /= e.sum(-1, keepdim=True)
        return e

class CrossDropped(PaddedEncoder):
    def hide(self, keep): return None

class PaddingInverted(PaddedEncoder):
    def hide(self, keep): return keep

# ---- the bugs: everything around it ----------------------------------------------------------------------------------

class PeByBatch(Positions):
    def forward(self, x): return x + self.pe[x.shape[0]]

class PeInPlace(Positions):
    def forward(self, x):
        x += self.pe[:x.shape[1]]
        return x

class NoPositions(Positions):
    def forward(self, x): return x

class WithPositions(nn.Module):
    "Tokens (b n d) -> positions -> encoder"
    def __init__(self, pos):
        super().__init__()
        self.pos, self.blocks, self.head = pos(), Block(), nn.Linear(DIM, CLASSES)
    def forward(self, x): return self.head(self.blocks(self.pos(x)).mean(1))

class PositionsFirst(Embed):
    "Positions are added before the class token is there: the table has a row too many"
    def forward(self, x):
        x = self.patches(x)
        x = x + self.pos[:, :x.shape[1]]
        return torch.cat([self.cls.expand(len(x), -1, -1), x], 1)

class ClassTokenLost(Embed):
    "The class token is put in front, and the patches alone are returned"
    def forward(self, x):
        x = self.patches(x)
        torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return x + self.pos[:, 1:]

class PatchesWithoutPositions(Embed):
    def forward(self, x):
        x = self.patches(x)
        return torch.cat([self.cls.expand(len(x), -1, -1) + self.pos[:, :1], x + self.pos[:, 1:2]], 1)

class PatchTooLarge(Embed):
    def __init__(self): super().__init__(patch=5)

class BatchStatistics(Embed):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(DIM, track_running_stats=False)
    def patches(self, x): return self.bn(self.proj(x)).flatten(2).transpose(1, 2)

class MeanOverBatch(Pool):
    def forward(self, x): return x.mean(0)

class FirstPatchLost(Embed):
    "There is no class token to cut off, but cut off it is"
    def forward(self, x): return (self.patches(x) + self.pos[:, 1:])[:, 1:]

class ReadTooEarly(ViT):
    "The class token is read before the encoder has filled it"
    def forward(self, x):
        x = self.embed(x)
        self.norm(self.blocks(x))
        return self.head(x[:, 0])

class DropoutAlways(MLP):
    def forward(self, x): return self.fc2(F.dropout(self.act(self.fc1(x)), .1))

class DropoutUnscaled(MLP):
    "Dropout by hand, without the 1/(1-p)"
    def forward(self, x):
        x = self.act(self.fc1(x))
        if self.training: x = x * torch.bernoulli(torch.full_like(x, .7))
        return self.fc2(x)

class SwapGrad(torch.autograd.Function):
    "Leaky ReLU whose backward has the two slopes the wrong way round"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, x, .1*x)
    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return torch.where(x > 0, .1*grad, grad)

class WrongBackwardAct(nn.Module):
    def forward(self, x): return SwapGrad.apply(x)

class WrongBackward(MLP):
    def __init__(self):
        super().__init__()
        self.act = WrongBackwardAct()

class UnusedNorm(Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm1(x))

class RunningMean(Block):
    "Centres every token on the mean over all tokens, those to come included"
    def __init__(self, attn, mlp):
        super().__init__(attn, mlp)
        self.attn.causal, self.centre = True, Centre()
    def forward(self, x): return super().forward(self.centre(x))

class Centre(nn.Module):
    def forward(self, x): return x - x.mean(1, keepdim=True)

class PlainList(ViT):
    "Layers in a Python list: they work, and no optimizer ever sees them"
    def __init__(self):
        super().__init__()
        self.blocks = None
        self.layers = [Block(), Block()]
    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers: x = layer.eval()(x)
        return self.head(self.pool(self.norm(x)))

class TrunkWithoutGrad(ViT):
    "A trunk that was meant to be trained, under no_grad"
    def forward(self, x):
        with torch.no_grad(): x = self.norm(self.blocks(self.embed(x)))
        return self.head(self.pool(x))

class Squeezed(ViT):
    def forward(self, x): return super().forward(x)[:, None].squeeze()

class StdNorm(nn.Module):
    "A norm by hand without an epsilon: a token that is constant divides by zero"
    def forward(self, x): return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

class NormWithoutEps(Embed):
    def __init__(self):
        super().__init__()
        self.norm = StdNorm()
        nn.init.zeros_(self.proj.bias)
    def patches(self, x): return self.norm(super().patches(x))

class Probabilities(nn.Linear):
    def forward(self, x): return super().forward(x).softmax(-1)

class Bounded(nn.Linear):
    def forward(self, x): return super().forward(x).sigmoid()

class Huge(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        nn.init.normal_(self.weight, std=5.)

class MixingInTraining(Pool):
    "A mixup left inside the model"
    def forward(self, x):
        x = x.mean(1)
        return .7*x + .3*x.flip(0) if self.training else x

# ---- the catalogue ---------------------------------------------------------------------------------------------------

@dataclass
class Bug:
    "One planted bug"
    name: str        # in a few words
    check: str       # that must find it
    module: str      # that must be named
    make: Callable   # () -> model
    given: Callable  # () -> the arguments of `diagnose` after the model
    also: tuple = ()        # further (check, module) that must find it
    right: Callable = None  # () -> the corrected model, which must raise no alarm
    source: str = ''        # where the bug was reported

def in_vit(**parts): return lambda: ViT(**parts)
def in_decoder(**parts): return lambda: Decoder(**parts)
def black(): return images() | dict(x=images()['x'] * (torch.arange(16) > 7))

# a query that may attend to nothing gets NaN from torch 2.4, and zeros from a newer one
one = torch.ones(1, 1, 1)
nothing_allowed = F.scaled_dot_product_attention(one, one, one, attn_mask=one.bool().logical_not())
EMPTY_ROW = 'finite' if nothing_allowed.isnan().any() else 'mask'     # the check that speaks first

CATALOGUE = [
    Bug('batch_first forgotten, mean over the tokens', 'batch', 'blocks.0.attn', in_vit(attn=TorchAttention), images),
    Bug('batch_first forgotten, class token', 'batch', 'blocks.0.attn',
        in_vit(attn=TorchAttention, pool=ClassToken), images, also=(('reach', 'pool'),)),
    Bug('nn.TransformerEncoder without batch_first', 'batch', 'layers.0.self_attn',
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, DIM), 2, enable_nested_tensor=False),
        tokens),
    Bug('reshape to (n b d) for a transpose', 'batch', 'blocks.0.attn', in_vit(attn=ReshapedForTorch), images),
    Bug('heads split by view(b, h, n, d)', 'attention', 'blocks.0.attn', in_vit(attn=SplitByView), images),
    Bug('heads merged without the transpose', 'attention', 'blocks.0.attn', in_vit(attn=MergedByView), images),
    Bug('attention among the heads of a token', 'attention', 'blocks.0.attn', in_vit(attn=NeverTransposed), images),
    Bug('softmax over dim 0', 'batch', 'blocks.0.attn', in_vit(attn=SoftmaxOverBatch), images,
        also=(('attention', 'blocks.0.attn'),)),
    Bug('softmax over the queries', 'attention', 'blocks.0.attn', in_vit(attn=SoftmaxOverQueries), images),
    Bug('nn.Softmax over the heads', 'attention', 'blocks.0.attn.softmax', in_vit(attn=SoftmaxOverHeads), images),
    Bug('scale after the softmax', 'attention', 'blocks.0.attn', in_vit(attn=ScaledAfter), images),
    Bug('scale by the whole width', 'attention', 'blocks.0.attn', in_vit(attn=ScaledByWidth), images),
    Bug('scale missing', 'attention', 'blocks.0.attn', in_vit(attn=NotScaled), images),
    Bug('scale twice, by hand and by torch', 'attention', 'blocks.0.attn', in_vit(attn=ScaledTwice), images),
    Bug('mask applied after the softmax', 'attention', 'blocks.0.attn', in_decoder(attn=MaskedAfter), causal_ids),
    Bug('mask computed and dropped', 'mask', 'blocks.0.attn', in_decoder(attn=MaskDropped), causal_ids),
    Bug('mask inverted', 'mask', 'blocks.0.attn', in_decoder(attn=MaskInverted), causal_ids),
    Bug('mask inverted, filled with -inf', 'finite', 'blocks.0.attn', in_decoder(attn=MaskInvertedInf), causal_ids),
    Bug('mask one token too far', 'mask', 'blocks.0.attn', in_decoder(attn=MaskOneTooFar), causal_ids),
    Bug('mean over tokens yet to come', 'mask', 'blocks.0.centre', in_decoder(block=RunningMean), causal_ids),
    Bug('padding mask not passed on', 'mask', 'layer.self_attn', CrossDropped, padded_ids),
    Bug('padding mask inverted', EMPTY_ROW, 'layer.self_attn', PaddingInverted, padded_ids),
    Bug('q and k detached', 'gradient', 'blocks.0.attn', in_vit(attn=DetachedQK), images),
    Bug('softmax normalised through .data', 'gradient', 'blocks.0.attn', in_vit(attn=DataSoftmax), images),
    Bug('softmax divided in place', 'gradient', 'blocks.0.attn', in_vit(attn=SoftmaxInPlace), images),
    Bug('autograd.Function with a wrong backward', 'gradient', 'blocks.0.mlp.act', in_vit(mlp=WrongBackward), images),
    Bug('trunk under no_grad', 'gradient', '', TrunkWithoutGrad, images),
    Bug('pe[x.shape[0]] for pe[:x.shape[1]]', 'batch size', 'pos', in_decoder(pos=PeByBatch), token_ids),
    Bug('positions forgotten', 'positions', '', in_decoder(pos=NoPositions, block=Block), token_ids),
    Bug('one position for all patches', 'positions', '', in_vit(embed=PatchesWithoutPositions), images),
    Bug('positions added before the class token', 'parameters', 'embed', in_vit(embed=PositionsFirst), images),
    Bug('x += positions on the caller\'s tensor', 'inplace', 'pos', lambda: WithPositions(PeInPlace), tokens),
    Bug('class token not returned', 'parameters', 'embed', in_vit(embed=ClassTokenLost), images),
    Bug('class token read before the encoder', 'reach', '', ReadTooEarly, images),
    Bug('patch size does not divide the image', 'reach', 'embed.proj', in_vit(embed=PatchTooLarge), images),
    Bug('first patch cut off for the class token', 'reach', 'embed', in_vit(embed=FirstPatchLost), images),
    Bug('mean over the batch for the tokens', 'batch', 'pool', in_vit(pool=MeanOverBatch), images),
    Bug('batch statistics in eval mode', 'batch', 'embed.bn', in_vit(embed=BatchStatistics), images),
    Bug('mixup left in the model', 'training batch', 'pool', in_vit(pool=MixingInTraining), images),
    Bug('squeeze() takes a batch of one along', 'batch size', '', Squeezed, images),
    Bug('F.dropout without training', 'repeat', 'blocks.0.mlp', in_vit(mlp=DropoutAlways), images),
    Bug('dropout without 1/(1-p)', 'modes', 'blocks.0.mlp', in_vit(mlp=DropoutUnscaled), images),
    Bug('norm2 built, norm1 called twice', 'parameters', 'blocks.0.norm2', in_vit(block=UnusedNorm), images),
    Bug('layers in a plain list', 'parameters', '', PlainList, images),
    Bug('norm without epsilon on a black patch', 'finite', 'embed.norm', in_vit(embed=NormWithoutEps), black),
    Bug('softmax before cross-entropy', 'loss', '', in_vit(head=Probabilities), images),
    Bug('head with huge weights', 'loss', '', in_vit(head=Huge), images),
    Bug('sigmoid on the logits', 'overfit', '', in_vit(head=Bounded), images),
]
