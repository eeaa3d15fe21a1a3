// What is looked at: one policy at one size, in one range and graph, and what is selected there.

const STATE = { policy: 0, size: 0, range: 0, graph: 0, selection: null, query: "", unit: "share" };
const LISTENERS = [];

/** Calls `listener` whenever one of `keys` has changed. */
function listen(keys, listener) {
    LISTENERS.push({ keys, listener });
}

/** Sets parts of the state, and tells who listens. A size brings its range, and a range a size in it. */
function change(parts) {
    const next = { ...parts };
    if ("size" in next && !("range" in next)) next.range = rangeOf(POINTS[next.size].tokens);
    else if ("range" in next && !("size" in next) && POINTS.length) next.size = sizeIn(next.range);
    const changed = Object.keys(next).filter((key) => STATE[key] !== next[key]);
    Object.assign(STATE, next);
    for (const { keys, listener } of LISTENERS) if (keys.some((key) => changed.includes(key))) listener(changed);
}

/** The range that serves a size, or the nearest one. */
function rangeOf(tokens) {
    const distance = (span) => (span ? Math.max(span[0] - tokens, tokens - span[1], 0) : 0);
    const distances = VIEW.ranges.map(distance);
    return distances.indexOf(Math.min(...distances));
}

const isServed = (tokens, span) => !span || (span[0] <= tokens && tokens <= span[1]);

/** The size at hand if a range serves it, or else one in its middle. */
function sizeIn(range) {
    const span = VIEW.ranges[range];
    return isServed(POINTS[STATE.size].tokens, span) ? STATE.size : middleSize(span);
}

function middleSize(span) {
    const middle = span ? Math.sqrt(span[0] * span[1]) : POINTS[0].tokens;
    const off = (point) => (isServed(point.tokens, span) ? 0 : 1e6) + Math.abs(Math.log(point.tokens / middle));
    return POINTS.reduce((best, point, index) => (off(point) < off(POINTS[best]) ? index : best), 0);
}

/** Where the page opens: the first policy, the first range, and a graph in which something is fused. */
function openState() {
    STATE.size = POINTS.length ? middleSize(VIEW.ranges[0]) : 0;
    const fused = GRAPHS.findIndex((graph) => graph.boxes.length && choiceOf(0, 0, graph.index).applied.length);
    STATE.graph = Math.max(0, fused >= 0 ? fused : GRAPHS.findIndex((graph) => graph.boxes.length));
}

const pointNow = () => POINTS[STATE.size] || null;
const policyNow = () => POLICIES[STATE.policy];
const rangeNow = () => policyNow()?.ranges[STATE.range];
const spanNow = () => VIEW.ranges[STATE.range];

/** The state in words, e.g. "planned at 8 tokens". */
function nowText() {
    const point = pointNow();
    return point ? `${number(point.tokens)} tokens` : `${spanText(spanNow())} tokens`;
}
