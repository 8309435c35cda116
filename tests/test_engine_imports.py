import subprocess
import sys


def test_the_engine_alone_does_not_import_lightning():
    code = (
        "import sys, glai_lightning, glai_lightning.heads, glai_lightning.solvers; "
        "sys.exit(any(name.split('.')[0] in ('lightning', 'torchmetrics', 'matplotlib') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
