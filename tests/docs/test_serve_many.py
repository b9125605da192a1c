"""docs/howto/serve-many.md: systemd and nginx accept the configuration, where these programs are installed."""

import shutil
import subprocess

import pytest

from tests.helpers.pages import ROOT, blocks

PAGE = ROOT / "docs/howto/serve-many.md"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    (unit,) = blocks(PAGE, "ini")
    (tmp_path / "timemix@.service").write_text(unit.replace("/opt/timemix/bin/timemix", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "timemix@8001.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "timemix@" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_the_servers(tmp_path):
    (servers,) = blocks(PAGE, "nginx")
    file = tmp_path / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    file.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{servers}}}\n")
    command = ["nginx", "-t", "-e", "stderr", "-c", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
