"""The engine against the plain loop: the same tokens, the same log-probabilities, for every family."""
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from tiny import BUILD, tiny
from fada.canary import probe_picture
from fada.vlm import build_prompt, load, reference_said

SHORT, PLAIN = 'Where?', 'Which standard plane is it?'
LONG = 'Which structures are seen, and how good is the quality of this image, in a few words: axial, sagittal or coronal?'
QUESTIONS = [SHORT, LONG, PLAIN, 'Is the femur seen?']
SEEDS = range(4)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('engine')

def open_tiny(architecture, folder, seed=0, tokens=8):
    "The real loader on a tiny checkpoint"
    name, _, weights = tiny(architecture, folder, seed)
    return load(name, weights=weights, device='cpu', max_new_tokens=tokens, precision='fp32')

def pictures(architecture, n=3):
    "Pictures of several shapes; None for a model without eyes"
    if architecture == 'gemma3-text': return [None]*n
    rng = np.random.default_rng(1); sizes = [(224, 224), (120, 160), (200, 90), (64, 64)]
    return [Image.fromarray(probe_picture() if not k else rng.integers(0, 255, (*sizes[k%4], 3), dtype=np.uint8)) for k in range(n)]

def same(got, want, tie=1e-4):
    """Whether an answer equals the reference's: ids, and log-probabilities to 1e-4. Ids may part only where the reference's
    best two lie within `tie`: there the log-probabilities of what each took agree to that"""
    n = next((k for k, (a, b) in enumerate(zip(got[0], want[0])) if a != b), None)
    if n is not None: return abs(got[1][n]-want[1][n]) < tie and np.allclose(got[1][:n], want[1][:n], atol=1e-4)
    return len(got[0]) == len(want[0]) and np.allclose(got[1], want[1], atol=1e-4)

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('architecture', list(BUILD))
def test_same_tokens_as_the_loop(architecture, seed, folder):
    "Three images of three shapes, questions of mixed length, one batch: tokens and log-probabilities of the loop"
    import torch
    vlm = open_tiny(architecture, folder, seed); images = pictures(architecture)
    at = [n for n in range(len(images)) for _ in QUESTIONS]
    if architecture == 'gemma3-text': at = [0]*len(QUESTIONS); images = [None]
    asked = (QUESTIONS*len(images))[:len(at)]
    got = vlm.said(vlm.see(images), at, [build_prompt(vlm.spec, q) for q in asked])
    want = [reference_said(vlm, images[n], q) for n, q in zip(at, asked)]
    for g, w in zip(got, want): assert same(g, w), (g, w)
    assert len({tuple(np.round(w[1], 3)) for w in want}) > 1   # the questions and pictures matter
