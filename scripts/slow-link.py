#!/usr/bin/env python3
"""Two machines on one: network namespaces `flops-a` and `flops-b`, joined by a slow link that loses packets.

    sudo scripts/slow-link.py --delay 5 --loss 1

A packet arrives after --delay milliseconds, or with a probability of --loss percent not at all; TCP
sends it again. The namespaces are 10.77.0.1 and 10.77.0.2, and there while this program runs. It
needs root, `ip` and /dev/net/tun, and no module of the kernel such as netem.
"""

import argparse
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
ENDS = [("flops-a", "10.77.0.1"), ("flops-b", "10.77.0.2")]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def open_end(namespace, address):
    """A tunnel whose one end is the namespace's network, and whose other end is the returned file."""
    name = namespace[-8:]
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    ip("netns", "add", namespace)
    ip("link", "set", name, "netns", namespace)
    ip("-n", namespace, "addr", "add", f"{address}/24", "dev", name)
    ip("-n", namespace, "link", "set", "lo", "up")
    ip("-n", namespace, "link", "set", name, "up", "mtu", "1500")
    return file


def forward(files, delay, loss, seed):
    """Carries packets from each end to the other, until a signal ends the program."""
    chance, under_way, number = random.Random(seed), [], 0
    counts = {"carried": 0, "lost": 0}
    running = True

    def stop(*_):
        nonlocal running
        running = False

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while running:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.2
        for file in select.select(files, [], [], wait)[0]:
            packet, now = os.read(file, 65536), time.monotonic()
            if chance.random() < loss:
                counts["lost"] += 1
                continue
            number += 1
            other = files[1 - files.index(file)]
            heapq.heappush(under_way, (now + delay, number, other, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(under_way)
            try:
                os.write(to, packet)
                counts["carried"] += 1
            except OSError:
                counts["lost"] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description="Two network namespaces joined by a slow link.")
    parser.add_argument("--delay", type=float, default=5.0, help="milliseconds each way")
    parser.add_argument("--loss", type=float, default=1.0, help="percent of the packets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the losses")
    args = parser.parse_args()
    if not 0 <= args.loss < 100 or args.delay < 0:
        parser.error("--delay must be at least 0, --loss from 0 to below 100")
    if os.geteuid() != 0:
        sys.exit("error: network namespaces need root; run it with sudo")
    try:
        files = [open_end(*end) for end in ENDS]
        print("ready", flush=True)
        counts = forward(files, args.delay / 1000, args.loss / 100, args.seed)
        print(f"{counts['carried']} packets carried, {counts['lost']} lost")
    except (OSError, subprocess.CalledProcessError) as why:
        sys.exit(f"error: {why}")
    finally:
        for namespace, _ in ENDS:
            subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main()
