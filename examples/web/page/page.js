"use strict";

(async () => {
    const find = (id) => document.getElementById(id);
    const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
    const thousands = (count) => count.toLocaleString("en");
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

    /* ---- the module ---- */

    const start = async () => {
        const packed = Uint8Array.from(atob(find("module").textContent), (letter) => letter.charCodeAt(0));
        const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
        await wasm_bindgen({ module_or_path: await new Response(unpacked).arrayBuffer() });
    };
    try {
        await start();
    } catch (error) {
        find("status").textContent = `This browser cannot run the page: ${error.message ?? error}`;
        return;
    }

    /* ---- training ---- */

    /** Milliseconds of steps at a time, between which the page can draw and answer. */
    const TURN = 24;
    /** Milliseconds of training between two looks at the test digits. */
    const LOOK = 150;

    let seed = 0, training, running, timer, seconds, lookedAt, loss, points;

    const reset = () => {
        clearTimeout(timer);
        training?.free();
        training = new wasm_bindgen.Training(seed);
        [running, seconds, lookedAt, loss] = [false, 0, 0, NaN];
        points = [[0, training.accuracy()]];
        find("parameters").textContent = thousands(training.parameters);
        find("test-digits").textContent = training.testDigits;
        status("Ready, with random weights.");
    };

    const finished = () => training.steps >= training.stepsInAll;

    const status = (text) => {
        find("status").textContent = text;
        find("train").textContent = running ? "Pause" : training.steps > 0 && !finished() ? "Go on" : "Train";
        find("train").disabled = finished();
        show();
    };

    const turn = () => {
        if (!running) return;
        const begun = performance.now();
        try {
            do {
                loss = training.step();
            } while (performance.now() < begun + TURN && !finished());
        } catch (error) {
            running = false;
            return status(`Training stopped: ${error.message ?? error}`);
        }
        seconds += (performance.now() - begun) / 1000;
        if (finished() || 1000 * (seconds - lookedAt) >= LOOK) {
            lookedAt = seconds;
            points.push([seconds, training.accuracy()]);
            answer();
        }
        if (finished()) {
            running = false;
            status(`Done in ${seconds.toFixed(1)} seconds of training: ${percent(points.at(-1)[1])} of the test digits.`);
        } else {
            show();
            timer = setTimeout(turn);
        }
    };

    find("train").onclick = () => {
        running = !running;
        clearTimeout(timer);
        status(running ? "Training…" : "Paused.");
        turn();
    };
    find("again").onclick = () => {
        seed += 1;
        reset();
        answer();
    };

    /* ---- figures and curve ---- */

    const show = () => {
        const accuracy = points.at(-1)[1];
        find("accuracy").textContent = percent(accuracy);
        find("loss").textContent = Number.isNaN(loss) ? "–" : loss.toFixed(3);
        find("step").textContent = `${thousands(training.steps)} of ${thousands(training.stepsInAll)}`;
        find("queries").textContent = thousands(training.queries);
        drawCurve();
    };

    const shape = (name, attributes, text = "") => {
        const node = document.createElementNS("http://www.w3.org/2000/svg", name);
        Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
        node.textContent = text;
        return node;
    };

    const drawCurve = () => {
        // in pixels of the page, so that letters keep their size
        const { width, height } = find("curve").getBoundingClientRect();
        find("curve").setAttribute("viewBox", `0 0 ${width} ${height}`);
        const [left, right, top, bottom] = [52, width - 20, 16, height - 32];
        const end = Math.max(2, ...points.map(([at]) => at));
        const every = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300].find((step) => end / step <= width / 90) ?? 600;
        const x = (at) => left + (right - left) * at / end;
        const y = (share) => bottom - (bottom - top) * share;
        const grid = [];
        for (const share of [0, 0.25, 0.5, 0.75, 1]) {
            grid.push(shape("line", { class: "grid", x1: left, x2: right, y1: y(share), y2: y(share) }));
            grid.push(shape("text", { x: left - 8, y: y(share) + 5, "text-anchor": "end" }, percent(share, 0)));
        }
        for (let at = 0; at <= end; at += every) {
            grid.push(shape("text", { x: x(at), y: bottom + 22, "text-anchor": "middle" }, `${at} s`));
        }
        find("grid").replaceChildren(...grid);
        find("line").setAttribute("d", points.map(([at, share], i) => `${i ? "L" : "M"}${x(at)} ${y(share)}`).join(""));
        const [at, share] = points.at(-1);
        const [anchor, beside] = x(at) > right - 80 ? ["end", -2] : ["start", 8];
        const below = share > 0.5 ? 24 : -12;
        find("now").replaceChildren(
            shape("circle", { cx: x(at), cy: y(share), r: 4.5 }),
            shape("text", { x: x(at) + beside, y: y(share) + below, "text-anchor": anchor }, percent(share)),
        );
        find("curve-title").textContent =
            `Accuracy on test digits: ${percent(points[0][1])} before training, ${percent(share)} after ${at.toFixed(1)} seconds`;
    };

    /* ---- drawing ---- */

    const pad = find("pad");
    /** Lines that are drawn, in pixels of the page; or a test digit, by its number. */
    let strokes = [], sample = null, pen = false;

    /** The 64 pixels that the network sees, without any where nothing is drawn. */
    const pixels = () => sample === null
        ? wasm_bindgen.image(new Float32Array(strokes.flat(2)), new Uint32Array(strokes.map((stroke) => stroke.length)))
        : training.testPixels(sample);

    /** Paints 8 × 8 pixels onto a canvas of this side. */
    const paint = (canvas, image, side) => {
        const brush = canvas.getContext("2d");
        brush.clearRect(0, 0, side, side);
        brush.fillStyle = colour("--text");
        image.forEach((ink, at) => {
            brush.globalAlpha = ink;
            brush.fillRect(at % 8 * side / 8, Math.floor(at / 8) * side / 8, side / 8, side / 8);
        });
        brush.globalAlpha = 1;
    };

    const drawPad = () => {
        const scale = devicePixelRatio || 1;
        const side = pad.clientWidth;
        pad.width = pad.height = Math.round(side * scale);
        if (sample !== null) return paint(pad, pixels(), pad.width);
        const brush = pad.getContext("2d");
        brush.setTransform(scale, 0, 0, scale, 0, 0);
        [brush.lineWidth, brush.lineCap, brush.lineJoin] = [side / 14, "round", "round"];
        brush.strokeStyle = colour("--text");
        for (const stroke of strokes) {
            brush.beginPath();
            brush.moveTo(...stroke[0]);
            stroke.forEach(([x, y]) => brush.lineTo(x, y));
            brush.stroke();
        }
    };

    const bars = Array.from({ length: 10 }, (_, digit) => {
        const row = document.createElement("li");
        row.innerHTML = `<span>${digit}</span><div><div class="bar"></div></div><span class="share">–</span>`;
        find("bars").append(row);
        return row;
    });

    const answer = () => {
        const image = pixels();
        const empty = image.length === 0;
        find("clear").disabled = empty;
        paint(find("seen"), image, 8);
        const shares = empty ? new Array(10).fill(0) : Array.from(training.probabilities(image));
        const best = shares.indexOf(Math.max(...shares));
        bars.forEach((row, digit) => {
            row.classList.toggle("best", !empty && digit === best);
            row.querySelector(".bar").style.width = percent(shares[digit]).replace(" ", "");
            row.querySelector(".share").textContent = empty ? "–" : percent(shares[digit], 0);
        });
        const truth = sample === null ? "" : ` It is a ${training.testLabel(sample)}.`;
        const text = empty
            ? "Draw with a finger, a pen or the mouse, before and after training. Sevens have a bar here."
            : `The network reads a ${best}.${truth}`;
        // a screen reader says what changes, and only then
        if (find("answer").textContent !== text) find("answer").textContent = text;
    };

    const change = () => {
        drawPad();
        answer();
    };

    const place = (event) => {
        const box = pad.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
    };
    pad.onpointerdown = (event) => {
        if (sample !== null) [sample, strokes] = [null, []];
        pad.setPointerCapture(event.pointerId);
        pen = true;
        strokes.push([place(event)]);
        change();
    };
    pad.onpointermove = (event) => {
        if (!pen) return;
        const events = event.getCoalescedEvents?.() ?? [];
        strokes.at(-1).push(...(events.length ? events : [event]).map(place));
        change();
    };
    pad.onpointerup = pad.onpointercancel = () => { pen = false; };
    find("clear").onclick = () => {
        [sample, strokes] = [null, []];
        change();
    };
    find("sample").onclick = () => {
        sample = Math.floor(Math.random() * training.testDigits);
        change();
    };
    addEventListener("resize", () => {
        drawPad();
        drawCurve();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", change);

    reset();
    change();
    for (const id of ["again", "sample"]) find(id).disabled = false;
})();
