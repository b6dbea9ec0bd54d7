"""Commands as processes of their own, forked from one that has imported the library: each of them starts at once.

A process forked here is as good as one from a shell: it has a folder, an environment and streams of its own, it can be
killed, and it hears Ctrl-C. It only lacks the import of torch and fastai, which takes longer than most of these tests.
"""
import multiprocessing, os, runpy, signal, subprocess, sys, tempfile
from pathlib import Path

FORKS = multiprocessing.get_context('forkserver')
# pytest, too: a fork imports what its parent has for `__main__`
FORKS.set_forkserver_preload(['vit_nbdev.runs', 'pytest'])

def _run(program, args, cwd, env, files):
    "What happens in the process"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, file in zip((1, 2), files): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [program, *args]
    runpy.run_path(program, run_name='__main__')

class Program:
    "A Python program at work, with the attributes of a `subprocess.Popen`"
    def __init__(self,
        name,       # of a command that pip installed, or of a script in `cwd`
        *args,      # what stands behind the name
        cwd,        # the folder it runs in
        stdout=None,  # where its output goes, if not to `communicate`
        **env,      # additions to the environment
    ):
        path = Path(cwd)/name if name.endswith('.py') else Path(sys.executable).parent/name
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(stdout or f'{self.folder.name}/out'), Path(self.folder.name)/'err']
        target = (str(path), list(map(str, args)), str(cwd), os.environ | env, self.files)
        self.process = FORKS.Process(target=_run, args=target)
        self.process.start()

    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.process.exitcode
    def kill(self): self.process.kill()
    def send_signal(self, number): os.kill(self.process.pid, number)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(self.process.name, timeout)
        return [f.read_text() if f.is_file() else '' for f in self.files]

def shell(name, *args, cwd, **env):
    "The exit code of a program, and what it wrote to its two streams"
    process = Program(name, *args, cwd=cwd, **env)
    out, err = process.communicate()
    return process.returncode, out, err
