// From one part of the page to another: selecting things, and showing where they are.

let opener = null;

/** Opens the details of something; a key press moves the focus there, a click leaves it. */
function select(selection, event) {
    if (!byId("details").contains(document.activeElement)) opener = document.activeElement;
    change({ selection });
    event?.target.closest?.(".item")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (event && event.detail === 0) byId("details").querySelector("h2")?.focus({ preventScroll: true });
}

/** Closes the details; the focus goes back to where they were opened from. */
function deselect() {
    const key = opener?.dataset?.key;
    change({ selection: null });
    const again = key && !opener.isConnected ? document.querySelector(`button[data-key="${CSS.escape(key)}"]`) : opener;
    if (again?.isConnected) again.focus({ preventScroll: true });
    opener = null;
}

function goTo(element) {
    element.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

const calm = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Brings a box into sight in the drawing, unfolding what hides it, and selects `selection` there. */
function showInGraph(graph, box, selection) {
    const segment = GRAPHS[graph].segments[GRAPHS[graph].boxes[box].segment];
    if (STATE.graph !== graph) change({ graph });
    const group = groupsOf(GRAPHS[graph]).find((each) => each.segments.includes(segment));
    if (group.segments.length > 1 && group.segments[0] !== segment) {
        OPEN.groups.add(segmentKey(group.segments[0]));
        OPEN.layers.add(segmentKey(segment));
    } else if (isOpen(group)) {
        OPEN.layers.add(segmentKey(segment));
    }
    drawLayers();
    change({ selection: selection || { kind: "box", graph, box } });
    const item = byId("layers").querySelector(`button[data-key="${CSS.escape(`box ${graph} ${box}`)}"]`);
    item?.scrollIntoView({ block: "center", inline: "nearest", behavior: calm() ? "auto" : "smooth" });
    return item;
}

/** A button that leads to a box. */
function boxLink(graph, index, text) {
    const box = GRAPHS[graph].boxes[index];
    return el(
        "button.link",
        { title: "show in the graph", onclick: () => showInGraph(graph, index) },
        text || [code(box.op || box.title), box.source ? el("small", box.source) : null],
    );
}

/** A button that leads to a fusion. */
function fusionLink(fusion) {
    return el(
        "button.link",
        { title: "show its details", onclick: () => showFusion(fusion) },
        ruleName(fusion.rule),
        el("small", fusion.provider),
    );
}

function showFusion(fusion) {
    const selection = { kind: "fusion", fusion: fusion.id };
    if (fusion.boxes.length) showInGraph(fusion.graph, homeOf(fusion), selection);
    else change({ selection });
}
