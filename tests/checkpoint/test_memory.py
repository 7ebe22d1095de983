"""Memory of loading, beside the model's: nearly none, since files are mapped.

Anonymous memory (RssAnon) is counted. Pages mapped from a file belong to the system's cache: they
count as resident (and in ru_maxrss), but the system can drop them.
"""

import subprocess
import sys
from types import SimpleNamespace

from helpers.server import Answer, Server

# One process for all sources, as building the model takes time. malloc returns large blocks to the
# system at once.
PROGRAM = """
import re, sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from mmattn.backbones import GCViT
from mmattn.checkpoint import load_checkpoint

folder, address = Path(sys.argv[1]), sys.argv[2]
torch.hub.set_dir(folder / 'hub')

def anonymous():
    return int(re.search(r'RssAnon:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024

def peak_while(work):
    before = highest = anonymous()
    done = threading.Event()
    def watch():
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest - before

arch = dict(embed_dims=192, depths=(1, 1, 1, 1), num_heads=(6, 12, 24, 48), mlp_ratio=4)
model = GCViT(arch)
size = sum(value.nbytes for value in model.state_dict().values())
torch.save({'state_dict': model.state_dict()}, folder / 'zip.pth')
torch.save(model.state_dict(), folder / 'old.pth', _use_new_zipfile_serialization=False)
contiguous = {k: v.contiguous() for k, v in model.state_dict().items()}
save_file(contiguous, folder / 'model.safetensors')
del contiguous
load_checkpoint(model, address + '/zip.pth')  # fills the download cache
print(size)
for source in ('zip.pth', 'model.safetensors', address + '/zip.pth', 'old.pth'):
    path = source if source.startswith('http') else folder / source
    print(peak_while(lambda: load_checkpoint(model, path)) / size)
"""


def test_loading_takes_no_second_copy(tmp_path):
    folder = SimpleNamespace(get=lambda path, _: Answer((tmp_path / path[1:]).read_bytes()))
    with Server(folder) as server:
        done = subprocess.run(
            [sys.executable, '-c', PROGRAM, tmp_path, server.address],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    size, *shares = [float(line) for line in done.stdout.splitlines() if 'downloading' not in line]
    assert size > 200e6
    zipped, safetensors, cached, old = shares
    assert max(zipped, safetensors, cached) < 0.05
    # Proof that a copy is seen: files of torch before 1.6 cannot be mapped.
    assert 0.5 < old < 1.1
