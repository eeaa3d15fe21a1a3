// The slider over numbers of tokens, with tracks that say which range serves a size and which choice is best there.

function openTokens() {
    openControl();
    if (!POINTS.length || POINTS.length < 2) return;
    byId("tokens").hidden = false;
    refill(byId("chart-tools"), unitPicker());
    byId("tokens-note").textContent = `each policy choosing for one size alone; ${flipText()}`;
    const chart = byId("chart");
    const plot = el("div.plot", { onpointerdown: (event) => dragOn(plot, event) });
    const tracks = el("div.tracks");
    refill(chart, plot, tracks);
    const draw = () => {
        const width = chart.clientWidth;
        if (!width) return; // nothing is laid out yet; the observer calls again
        refill(plot, drawChart(width));
        refill(tracks, tracksOf(width));
        placeSlider(width);
    };
    listen(["size", "range", "policy", "unit"], draw);
    new ResizeObserver(draw).observe(chart);
    draw();
}

function unitPicker() {
    const pick = (unit, label) => radio("unit", unit, STATE.unit === unit, () => change({ unit }), label);
    return el(
        "fieldset.segments",
        el("legend.unseen", "Unit of the chart"),
        pick("share", "% of these ops"),
        pick("us", "µs a step"),
    );
}

/** The size under the pointer becomes the one that is looked at, as long as it is held down. */
function dragOn(plot, event) {
    const { left, width } = plot.getBoundingClientRect();
    const take = (at) => {
        const distances = POINTS.map((_, index) => Math.abs(stepX(index, width) + left - at.clientX));
        change({ size: distances.indexOf(Math.min(...distances)) });
    };
    take(event);
    plot.setPointerCapture(event.pointerId);
    const stop = () => plot.removeEventListener("pointermove", take);
    plot.addEventListener("pointermove", take);
    plot.addEventListener("pointerup", stop, { once: true });
    plot.addEventListener("pointercancel", stop, { once: true });
}

/** Runs of equal values over the sizes: [{value, from, to}]. */
function runsOf(values) {
    const runs = [];
    values.forEach((value, index) => {
        if (runs.length && runs.at(-1).value === value) runs.at(-1).to = index;
        else runs.push({ value, from: index, to: index });
    });
    return runs;
}

function tracksOf(width) {
    const first = LINED[0];
    const plans = runsOf(POINTS.map((point) => point.at[first.index].outcome));
    return [
        trackRow(
            "compile range",
            VIEW.ranges
                .map((span, index) => ({ span, index }))
                .filter(({ span }) => stepsOf(span)[0] >= 0)
                .map(({ span, index }) => {
                    const [from, to] = stepsOf(span);
                    return trackPart(from, to, width, spanText(span), {
                        pressed: index === STATE.range,
                        title: `compile range ${spanText(span)} tokens`,
                        onclick: () => change({ range: index }),
                    });
                }),
        ),
        first.name === "planned"
            ? trackRow(
                  "best plan",
                  plans.map((run) => outcomePart(run, width)),
              )
            : null,
        orderSets().map((set) => orderTrack(set, width)),
    ];
}

function outcomePart(run, width) {
    const text = outcomeText(run.value);
    return trackPart(run.from, run.to, width, text, {
        title: `best plan ${runText(run)}: ${text}`,
        pressed: STATE.size >= run.from && STATE.size <= run.to,
        onclick: () => change({ size: inRun(run), policy: LINED[0].index }),
    });
}

/** The size at hand if a run has it, else the end of the run that is nearest to it. */
const inRun = (run) => Math.max(run.from, Math.min(run.to, STATE.size));

const runText = (run) => `from ${number(POINTS[run.from].tokens)} to ${number(POINTS[run.to].tokens)} tokens`;

function outcomeText(index) {
    const outcome = VIEW.sizes.outcomes[index];
    return outcome.length ? outcome.map(([name, count]) => `${number(count)} ${name}`).join(" + ") : "nothing fused";
}

function orderTrack(set, width) {
    const runs = runsOf(POINTS.map((point) => bestOf(set, point)));
    return trackRow(
        orderTitle(set),
        runs.map((run) => {
            const best = run.value.split(" ").map((index) => POLICIES[index]);
            const [first] = best;
            return trackPart(run.from, run.to, width, best.length > 1 ? lettersOf(best, " = ") : namedPolicy(first), {
                title: `${best.map((policy) => policy.name).join(" or ")} ${runText(run)}`,
                pressed: STATE.size >= run.from && STATE.size <= run.to,
                onclick: () => change({ size: inRun(run), policy: first.index }),
            });
        }),
    );
}

const trackRow = (name, parts) =>
    el("div.track", { role: "group", "aria-label": name }, el("span.track-name", name), parts);

function trackPart(from, to, width, text, { pressed, title, onclick }) {
    const half = (stepX(1, width) - stepX(0, width)) / 2;
    const [x, end] = [stepX(from, width) - half, stepX(to, width) + half];
    return el(
        "button.track-part",
        {
            title,
            onclick,
            "aria-pressed": String(pressed),
            style: { left: `${x + 1}px`, width: `${end - x - 2}px` },
        },
        el("span", text),
    );
}

/** What is looked at: the size by a slider, and the policy. It stays in sight. */
function openControl() {
    const control = byId("control");
    const picker = el(
        "select",
        { id: "policy-picker", "aria-label": "Policy", onchange: () => change({ policy: Number(picker.value) }) },
        POLICIES.map((policy) => el("option", { value: policy.index }, `${policy.letter} ${pickText(policy)}`)),
    );
    const readout = el("output.readout", { for: "size", id: "readout" });
    const slider = POINTS.length > 1 ? sizeSlider() : rangePicker();
    refill(
        control,
        el(
            "div.control-inner",
            readout,
            el("div.slider", { id: "slider" }, slider),
            el("label.pick", el("span.unseen", "Policy "), picker),
        ),
    );
    const show = () => {
        picker.value = STATE.policy;
        refill(readout, readoutOf());
        if (POINTS.length > 1) {
            slider.value = STATE.size;
            slider.setAttribute("aria-valuetext", valueText());
        }
    };
    listen(["size", "range", "policy"], show);
    show();
}

const pickText = (policy) => (policy.counterfactual ? "nothing forced" : shortPolicy(policy));

function sizeSlider() {
    const slider = el("input", {
        id: "size",
        type: "range",
        min: 0,
        max: POINTS.length - 1,
        step: 1,
        "aria-label": "Tokens",
        oninput: () => change({ size: Number(slider.value) }),
    });
    return slider;
}

/** Without sizes to slide over: the ranges alone. */
function rangePicker() {
    if (VIEW.ranges.length < 2) return el("span");
    const picks = VIEW.ranges.map((span, index) =>
        radio("range", index, index === STATE.range, () => change({ range: index }), spanText(span)),
    );
    return el("fieldset.segments", el("legend.unseen", "Compile range"), picks);
}

function readoutOf() {
    const point = pointNow();
    const span = spanNow();
    if (!point) return [el("b", spanText(span)), " tokens"];
    const served = isServed(point.tokens, span);
    return [
        el("b", number(point.tokens)),
        point.tokens === 1 ? " token" : " tokens",
        el("span", served ? `range ${spanText(span)}` : "no range"),
    ];
}

function valueText() {
    const point = pointNow();
    const at = point.at[STATE.policy];
    const saved = at
        ? `, ${policyNow().name} saves ${us(at.saved)}, ${share(at.saved, point.unfused)} of the ops’ time`
        : "";
    return `${plural(point.tokens, "token")}, compile range ${spanText(spanNow())}${saved}`;
}

/** Keeps the thumb of the slider under the cursor of the chart. */
function placeSlider(width) {
    const slider = byId("size");
    if (!slider) return;
    const thumb = 16;
    const { left } = byId("chart").getBoundingClientRect();
    const inner = byId("slider").getBoundingClientRect();
    const from = stepX(0, width) + left - inner.left - thumb / 2;
    slider.style.setProperty("margin-left", `${from}px`);
    slider.style.setProperty("width", `${stepX(POINTS.length - 1, width) - stepX(0, width) + thumb}px`);
}
