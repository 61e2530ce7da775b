__version__ = "0.1.0"

def load_ipython_extension(shell):
    "`%load_ext fada`: from then on `%fada …` in a cell runs a command in that kernel"
    from .book import run_command
    shell.register_magic_function(run_command, 'line', 'fada')
