// What each policy saves at each size, as lines. A step of the slider is a step to the right: two an octave.

const CHART_HEIGHT = 190;

/** Gutters beside the plot, in pixels; the slider below keeps to them. */
function guttersOf(width) {
    return width > 720 ? { left: 112, right: 150 } : { left: 34, right: 34 };
}

/** The middle of a step, in pixels from the left of the chart. */
function stepX(index, width) {
    const { left, right } = guttersOf(width);
    return left + ((index + 0.5) / POINTS.length) * (width - left - right);
}

const valueOf = (point, policy) =>
    STATE.unit === "share"
        ? (100 * point.at[policy].saved) / Math.max(1, point.unfused)
        : point.at[policy].saved / 1000;

const LINED = POLICIES.filter((policy) => !policy.counterfactual);

function drawChart(width) {
    const { left, right } = guttersOf(width);
    const values = POINTS.flatMap((point) => LINED.map((policy) => valueOf(point, policy.index)));
    const [low, high, step] = scaleOf(Math.min(0, ...values), Math.max(0, ...values));
    const y = (value) => 12 + (CHART_HEIGHT - 24) * (1 - (value - low) / (high - low));
    const size = { width, height: CHART_HEIGHT, viewBox: `0 0 ${width} ${CHART_HEIGHT}` };
    const unit = STATE.unit === "share" ? "per cent of the unfused time of contested sites" : "microseconds a step";
    return svg(
        "svg.chart",
        {
            ...size,
            role: "img",
            "aria-label": `Saved by each policy, in ${unit}, by tokens. The table of policies has the numbers.`,
        },
        bandsOf(width),
        gridOf(low, high, step, y, left, width - right),
        orderSets().map((set) => orderFlips(set).map((index) => flipLine("g.flip.order", index, width))),
        planFlips().map((index) => flipLine("g.flip", index, width)),
        [...LINED].reverse().map((policy) => lineOf(policy, y, width)),
        plannedDots(y, width),
        cursorOf(y, width),
        endLabels(y, width),
    );
}

/** [lowest, highest, step] of an axis with four to seven round steps. */
function scaleOf(low, high) {
    if (high === low) return [low, low + 1, 0.5];
    const span = high - low;
    const power = 10 ** Math.floor(Math.log10(span / 4));
    const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => span / each <= 6);
    return [Math.floor(low / step) * step, Math.ceil(high / step) * step || step, step];
}

function gridOf(low, high, step, y, left, right) {
    const lines = [];
    const digits = step < 1 || step === 2.5 ? 1 : 0;
    for (let value = low; value <= high + step / 2; value += step) {
        const label = STATE.unit === "share" ? `${number(value, digits)} %` : number(value, digits);
        lines.push(svg(value === 0 ? "path.axis" : "path.grid", { d: `M${left} ${y(value)} H${right}` }));
        lines.push(svg("text.tick", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, label));
    }
    return svg("g", lines);
}

/** Every other compile range is shaded. */
function bandsOf(width) {
    return VIEW.ranges.map((span, index) => {
        const [from, to] = stepsOf(span);
        if (from < 0) return null;
        const half = (stepX(1, width) - stepX(0, width)) / 2;
        const x = stepX(from, width) - half;
        return svg(index === STATE.range ? "rect.band-now" : index % 2 ? "rect.band-odd" : "rect.band-even", {
            x,
            y: 0,
            width: stepX(to, width) + half - x,
            height: CHART_HEIGHT,
        });
    });
}

/** First and last size that a range serves. */
function stepsOf(span) {
    const served = POINTS.flatMap((point, index) => (isServed(point.tokens, span) ? [index] : []));
    return served.length ? [served[0], served.at(-1)] : [-1, -1];
}

function lineOf(policy, y, width) {
    const points = POINTS.map((point, index) => `${stepX(index, width)},${y(valueOf(point, policy.index))}`);
    const now = policy.index === STATE.policy;
    return svg(now ? "polyline.line.now" : "polyline.line", {
        points: points.join(" "),
        "data-dash": now ? null : policy.index % 5,
    });
}

/** What the plan of each range saves at the sizes that it was priced at: one plan for all of them. */
function plannedDots(y, width) {
    const policy = policyNow();
    return policy.ranges.flatMap((range) =>
        range.sizes.map(([tokens, unfused, saved]) => {
            const index = POINTS.findIndex((point) => point.tokens === tokens);
            if (index < 0) return null;
            const value = STATE.unit === "share" ? (100 * saved) / Math.max(1, unfused) : saved / 1000;
            return svg("rect.dot", { x: stepX(index, width) - 3, y: y(value) - 3, width: 6, height: 6 });
        }),
    );
}

function cursorOf(y, width) {
    const x = stepX(STATE.size, width);
    return svg(
        "g.cursor",
        svg("path", { d: `M${x} 0 V${CHART_HEIGHT}` }),
        LINED.map((policy) =>
            svg(policy.index === STATE.policy ? "circle.now" : "circle", {
                cx: x,
                cy: y(valueOf(pointNow(), policy.index)),
                r: 3.5,
            }),
        ),
    );
}

function flipLine(kind, index, width) {
    const x = (stepX(index, width) + stepX(index - 1, width)) / 2;
    return svg(
        kind,
        svg("path", { d: `M${x} 0 V${CHART_HEIGHT}` }),
        svg("path.flag", { d: `M${x - 5} 0 H${x + 5} L${x} 7 Z` }),
    );
}

/** Names at the ends of the lines; equal lines share one, and none covers another. */
function endLabels(y, width) {
    const { right } = guttersOf(width);
    const last = POINTS.at(-1);
    const ends = new Map();
    for (const policy of LINED) {
        const key = y(valueOf(last, policy.index)).toFixed(0);
        ends.set(key, [...(ends.get(key) || []), policy]);
    }
    const labels = [...ends].map(([key, policies]) => ({ top: Number(key), policies })).sort((a, b) => a.top - b.top);
    spread(labels, 10, CHART_HEIGHT - 8);
    return labels.map((end) => {
        const { top } = end;
        const now = end.policies.some((policy) => policy.index === STATE.policy);
        const names = right > 100 ? ` ${fitted(end.policies.map(shortPolicy), 20)}` : "";
        return svg(
            now ? "text.end.now" : "text.end",
            { x: width - right + 10, y: top + 4 },
            svg("tspan.letter", end.policies.map((policy) => policy.letter).join(" ")),
            names,
        );
    });
}

/** Moves labels apart, down and then, from the lowest place there is, up. */
function spread(labels, first, last) {
    const high = 14;
    labels.forEach((label, index) => (label.top = Math.max(label.top, index ? labels[index - 1].top + high : first)));
    [...labels]
        .reverse()
        .forEach((label, index, from) => (label.top = Math.min(label.top, index ? from[index - 1].top - high : last)));
}

function fitted(names, most) {
    const text = names.length > 1 ? names[0] : names.join("");
    return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}
