// The graph: segments in order, those that look alike as one until they are unfolded.

const OPEN = { groups: new Set(), layers: new Set() };

function openLayers() {
    if (!GRAPHS.some((graph) => graph.boxes.length)) return;
    byId("graph").hidden = false;
    refill(byId("graph-tools"), graphPicker(), el("button.quiet", { id: "unfold", onclick: toggleAll }, ""));
    refill(byId("legend"), legend());
    listen(["policy", "range", "graph"], drawLayers);
    listen(["query"], markFound);
    listen(["selection"], markSelected);
    new ResizeObserver(fitBoxes).observe(byId("layers"));
    openFocus(byId("layers"));
    drawLayers();
}

function graphPicker() {
    const drawn = GRAPHS.filter((graph) => graph.boxes.length);
    if (drawn.length < 2) return null;
    const options = drawn.map((graph) => {
        const count = choiceOf(0, 0, graph.index).applied.length;
        return el(
            "option",
            { value: graph.index, selected: graph.index === STATE.graph },
            `${graph.name}, ${plural(graph.boxes.length, "box", "boxes")}, ${count} fused`,
        );
    });
    const picker = el(
        "select",
        { id: "graph-picker", "aria-label": "Graph", onchange: () => change({ graph: Number(picker.value) }) },
        options,
    );
    listen(["graph"], () => (picker.value = STATE.graph));
    return el("label.pick", "graph ", picker);
}

/** Runs of segments that look alike under the policy and range at hand. */
function groupsOf(graph) {
    const groups = [];
    for (const segment of graph.segments) {
        const likeness = likenessOf(graph, segment, STATE.policy, STATE.range);
        const last = groups.at(-1);
        if (last && last.likeness === likeness && segment.number !== null) last.segments.push(segment);
        else groups.push({ likeness, segments: [segment] });
    }
    return groups;
}

function drawLayers() {
    const graph = GRAPHS[STATE.graph];
    const focused = document.activeElement?.closest("#layers") ? document.activeElement.dataset.key : null;
    metricsFor(byId("layers").clientWidth);
    const groups = groupsOf(graph);
    refill(
        byId("layers"),
        groups.map((group) => groupRow(graph, group)),
    );
    const folded = groups.some((group) => group.segments.length > 1);
    const unfold = byId("unfold");
    unfold.hidden = !folded;
    unfold.textContent = groups.some((group) => isOpen(group)) ? "Fold layers that look alike" : "Unfold all layers";
    refill(
        byId("graph-note"),
        "under ",
        el("b", policyLabel(policyNow())),
        ` at ${spanText(spanNow())} tokens; ${sizeText(graph)}`,
    );
    markFound();
    markSelected();
    restoreFocus(focused);
}

function sizeText(graph) {
    const layers = graph.segments.filter((segment) => segment.number !== null).length;
    return [layers ? plural(layers, "layer") : null, plural(graph.boxes.length, "box", "boxes")]
        .filter(Boolean)
        .join(", ");
}

const isOpen = (group) => group.segments.length > 1 && OPEN.groups.has(segmentKey(group.segments[0]));
const segmentKey = (segment) => `${segment.graph} ${segment.index}`;

function toggleAll() {
    const groups = groupsOf(GRAPHS[STATE.graph]).filter((group) => group.segments.length > 1);
    const open = groups.some(isOpen);
    for (const group of groups) {
        const key = segmentKey(group.segments[0]);
        if (open) OPEN.groups.delete(key);
        else OPEN.groups.add(key);
    }
    drawLayers();
}

/** One row: what it is, and its drawing; an unfolded group has a row for each of its layers. */
function groupRow(graph, group) {
    const [first] = group.segments;
    if (group.segments.length === 1) return layerRow(graph, first, FULL, layerHead(first));
    const count = el("span", `${group.segments.length} alike`);
    const head = foldHead("fold", OPEN.groups, first, runTitle(group.segments), count);
    if (!isOpen(group)) return layerRow(graph, first, FULL, head);
    return el(
        "div.layer-group",
        { role: "group", "aria-label": runTitle(group.segments) },
        el("div.layer-row.group-head", el("div.layer-head", head)),
        group.segments.map((segment) => unfoldedRow(graph, segment)),
    );
}

/** A button that opens and folds a segment, which `opened` has where it is open. */
function foldHead(kind, opened, segment, title, more = null) {
    const key = segmentKey(segment);
    const toggle = () => {
        if (!opened.delete(key)) opened.add(key);
        drawLayers();
    };
    return itemOf(
        "button.item.fold",
        { "aria-expanded": String(opened.has(key)), "data-key": `${kind} ${key}`, onclick: toggle },
        el("span.caret", { "aria-hidden": "true" }),
        el("b", title),
        more,
    );
}

/** A layer of an unfolded group: compact, until it is opened itself. */
function unfoldedRow(graph, segment) {
    const open = OPEN.layers.has(segmentKey(segment));
    const head = foldHead("layer", OPEN.layers, segment, segmentTitle(segment));
    return layerRow(graph, segment, open ? FULL : COMPACT, head);
}

function layerRow(graph, segment, metrics, head) {
    const kind = metrics.detailed ? "div.layer-row" : "div.layer-row.small";
    return el(
        kind,
        { "data-segment": segment.index, role: "group", "aria-label": segmentTitle(segment) },
        el("div.layer-head", head, metrics.detailed ? null : lossCount(graph, segment)),
        layerFigure(graph, segment, metrics),
    );
}

function lossCount(graph, segment) {
    const count = happeningsIn(graph, segment, STATE.policy, STATE.range).losses.filter(({ fusion }) =>
        segment.boxes.includes(homeOf(fusion)),
    ).length;
    return count ? el("span.faint", { title: "candidates that lost here" }, `✕ ${count}`) : null;
}

const layerHead = (segment) => el("b", breakable(segmentTitle(segment)));

function segmentTitle(segment) {
    if (segment.number === null) return segment.name;
    const prefixes = new Set(
        GRAPHS[segment.graph].segments.filter((each) => each.key).map((each) => each.key.replace(/\d+$/, "")),
    );
    return prefixes.size > 1 ? segment.key : `layer ${segment.number}`;
}

function runTitle(segments) {
    const [first, last] = [segments[0], segments.at(-1)];
    return `${segmentTitle(first).replace(/^layer /, "layers ")}–${last.number}`;
}

/** Boxes grow with the room there is, so that a layer fills its row. */
function metricsFor(width) {
    const graph = GRAPHS[STATE.graph];
    const columns = Math.max(...graph.segments.map((segment) => columnsOf(graph, segment.boxes).length));
    const head = width > 640 ? 132 : 0;
    const room = width - head - 2 * FULL.edge - 8;
    const fit = Math.floor((room + FULL.gap) / columns) - FULL.gap;
    const most = Math.max(...graph.segments.map((segment) => segment.boxes.length));
    COMPACT.box[0] = Math.max(64, Math.min(104, Math.floor((room + COMPACT.gap) / most) - COMPACT.gap));
    FULL.box[0] = Math.max(92, Math.min(152, fit));
    return FULL.box[0];
}

function fitBoxes() {
    const before = FULL.box[0];
    if (metricsFor(byId("layers").clientWidth) !== before) drawLayers();
}

/** Dims what a search doesn't mean. */
function markFound() {
    const query = STATE.query.toLowerCase();
    byId("layers").classList.toggle("searching", Boolean(query));
    for (const item of byId("layers").querySelectorAll("[data-key]")) {
        item.classList.toggle("found", Boolean(query) && isMeant(item.dataset.key, query));
    }
}

function isMeant(key, query) {
    const [kind, first, second] = key.split(" ");
    if (kind === "box" || kind === "near") return textOfBox(GRAPHS[first].boxes[second]).includes(query);
    return kind === "fusion" && textOfFusion(FUSIONS[first]).includes(query);
}

const textOfBox = rememberedBy((box) =>
    [box.op, box.title, box.source, box.line, ...box.members, ...box.calls.map(([name]) => name)]
        .join(" ")
        .toLowerCase(),
);
const textOfFusion = rememberedBy((fusion) =>
    [fusion.rule, fusion.op, fusion.provider, fusion.source, fusion.anchor].join(" ").toLowerCase(),
);

function markSelected() {
    const { selection } = STATE;
    for (const item of byId("layers").querySelectorAll("[data-fusion]")) {
        item.classList.toggle(
            "selected",
            selection?.kind === "fusion" && Number(item.dataset.fusion) === selection.fusion,
        );
    }
    for (const item of byId("layers").querySelectorAll(".box")) {
        item.classList.toggle(
            "selected",
            selection?.box !== undefined && item.dataset.key === `box ${selection.graph} ${selection.box}`,
        );
    }
}
