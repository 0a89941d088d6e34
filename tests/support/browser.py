"""A page in headless Chromium, which scripts are run in through its DevTools protocol."""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60.0  # until a script has given a value


def in_page(address: str, profile: Path, scripts: list[str]) -> list[Any]:
    """Run scripts one after another in a page; each is run again until it gives a value that is true."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={profile}", address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        try:
            assert browser.stderr is not None
            lines = iter(browser.stderr.readline, "")
            port = next(found[1] for line in lines if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
            return asyncio.run(_run(port, scripts))
        finally:
            browser.kill()


async def _run(port: str, scripts: list[str]) -> list[Any]:
    import aiohttp

    async with aiohttp.ClientSession() as session, asyncio.timeout(SECONDS):
        async with session.get(f"http://127.0.0.1:{port}/json") as reply:
            (page,) = [target for target in await reply.json(content_type=None) if target["type"] == "page"]
        async with session.ws_connect(page["webSocketDebuggerUrl"]) as socket:
            found = []
            for number, script in enumerate(scripts):
                value = None
                while not value:
                    parameters = {"expression": script, "returnByValue": True}
                    await socket.send_json({"id": number, "method": "Runtime.evaluate", "params": parameters})
                    value = (await socket.receive_json()).get("result", {}).get("result", {}).get("value")
                    await asyncio.sleep(0.05)
                found.append(value)
            return found
