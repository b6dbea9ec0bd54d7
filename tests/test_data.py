"""CIFAR-10 in the layout that torchvision writes, with a few images of its form."""
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from vit_nbdev.data import cifar10_dls

@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    "Six files of 24 images; their checksums are other than the real ones', so none is asked for"
    monkeypatch.setattr(CIFAR10, 'train_list', [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, 'test_list', [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': None})
    folder, rng = tmp_path/CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {'data': rng.integers(256, size=(24, 3072), dtype=np.uint8), 'labels': [i % 2 for i in range(24)]}
        (folder/name).write_bytes(pickle.dumps(batch))
    (folder/'batches.meta').write_bytes(pickle.dumps({'label_names': ['aeroplane', 'car']}))
    return folder

def test_cifar10(fake_cifar):
    "Every image of the test file arrives, channels first, with its label"
    dls = cifar10_dls(fake_cifar.parent, bs=8, device='cpu')
    assert [len(dl.dataset) for dl in dls] == [110, 10, 24]
    raw = pickle.loads((fake_cifar/'test_batch').read_bytes())
    assert torch.equal(dls[2].dataset.x, torch.from_numpy(raw['data']).view(24, 3, 32, 32))
    assert dls[2].dataset.y.tolist() == raw['labels'] and dls.vocab[1] == 'car'
    assert dls.one_batch()[0].shape == (8, 3, 32, 32)

def test_damaged_cifar10(fake_cifar):
    (fake_cifar/'data_batch_3').write_bytes(b'cut off')
    with pytest.raises(ValueError, match='does not hold CIFAR10 .*: delete the folder to fetch it again'):
        cifar10_dls(fake_cifar.parent)
