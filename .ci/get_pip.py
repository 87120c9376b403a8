"""Put pip into a virtual environment made with `--without-pip`: `VENV/bin/python .ci/get_pip.py`.

For machines whose Python comes without ensurepip (Debian and Ubuntu without python3-venv), where nobody is root. Takes
the newest pip from the package index (PIP_INDEX_URL, else PyPI), checks its sha256, and has it install itself.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

WHEEL = r"/pip-(?P<version>\d+(?:\.\d+)*)-py3-none-any\.whl"
LINK = re.compile(rf'href="(?P<url>[^"#]*{WHEEL})#sha256=(?P<sha256>[0-9a-f]{{64}})"')


def main() -> None:
    page = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    found = list(LINK.finditer(urlopen(page, timeout=60).read().decode()))
    if not found:
        sys.exit(f"no wheel of pip at {page}: set PIP_INDEX_URL, or install the package python3-venv")
    newest = max(found, key=lambda link: [int(part) for part in link["version"].split(".")])
    data = urlopen(urljoin(page, newest["url"]), timeout=60).read()
    if hashlib.sha256(data).hexdigest() != newest["sha256"]:
        sys.exit(f"the wheel of pip {newest['version']} from {page} is damaged: try again")
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / Path(newest["url"]).name
        wheel.write_bytes(data)
        subprocess.run([sys.executable, f"{wheel}/pip", "install", "--quiet", str(wheel)], check=True)


if __name__ == "__main__":
    main()
