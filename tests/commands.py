"The command line as a test types it."

import shlex, subprocess, sys

FADA = [sys.executable, '-m', 'fada.cli']


def typed(line, **places):
    "The words of `fada LINE` in a process of its own; `{name}` in the line stands for one of `places`"
    return [*FADA, *(word.format(**places) for word in shlex.split(line))]


def one_training(folder, root, data, env=None):
    "A batch of one short training in `folder`, beside the run notebooks: a function that runs it"
    grid, out = folder / 'night.toml', folder / 'o'
    (folder / 'nbs').symlink_to(root / 'nbs')
    grid.write_text(
        f'models = ["blip2-nano"]\ncategories = ["Femur"]\nseeds = [0]\ndata = "{data}"\ntasks = ["train"]\n'
        '[parameters.train]\nsteps = 2\nbatch = 4\nimages = 6\n'
    )
    command = typed('batch {grid} --out {out} --json', grid=grid, out=out)
    return lambda: subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
