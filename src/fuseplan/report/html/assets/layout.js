// Where the boxes of a segment lie: a column for each step of the data flow, and rows for what runs beside each other.

const FULL = {
    box: [104, 46],
    gap: 26,
    row: 26,
    edge: 20,
    pad: 6,
    label: 18,
    lane: 23,
    bus: 9,
    detailed: true,
};
const COMPACT = { box: [74, 20], gap: 9, row: 5, edge: 20, pad: 3, label: 0, lane: 0, bus: 0, detailed: false };

/**
 * {boxes: place by index, width, height, buses ...}, in pixels. `lanes` is the room above, for what has lost. A compact
 * drawing has one row.
 */
function layoutOf(graph, indices, metrics, lanes) {
    const steps = columnsOf(graph, indices);
    const columns = metrics.detailed ? steps : steps.flat().map((index) => [index]);
    const [width, height] = metrics.box;
    const top = lanes ? lanes * metrics.lane + 12 : metrics.pad + 2;
    const places = new Map();
    columns.forEach((column, at) => {
        column.forEach((index, row) => {
            const y =
                top +
                (row ? height + metrics.label + metrics.pad + metrics.row + (row - 1) * (height + metrics.row / 2) : 0);
            places.set(index, {
                x: metrics.edge + at * (width + metrics.gap),
                y,
                w: width,
                h: height,
                column: at,
                row,
            });
        });
    });
    const rows = Math.max(...columns.map((column) => column.length));
    const bottom = Math.max(...[...places.values()].map((place) => place.y + height));
    const below = rows > 1 ? metrics.pad : metrics.label + metrics.pad;
    const buses = metrics.detailed ? busesOf(graph, indices, places, columns.length - 1) : [];
    return {
        boxes: places,
        width: 2 * metrics.edge + columns.length * width + (columns.length - 1) * metrics.gap,
        height: bottom + below + (buses.length ? 10 + buses.length * metrics.bus : 4),
        bus: (lane) => bottom + below + 10 + lane * metrics.bus,
        last: columns.length - 1,
        buses,
    };
}

/** Boxes by the longest path that leads to them inside the segment; ops of the dialect come first in a column. */
function columnsOf(graph, indices) {
    const column = new Map();
    const columns = [];
    for (const index of indices) {
        const before = graph.boxes[index].inputs.filter((input) => column.has(input)).map((input) => column.get(input));
        const at = before.length ? Math.max(...before) + 1 : 0;
        column.set(index, at);
        (columns[at] ||= []).push(index);
    }
    for (const each of columns) each.sort((a, b) => !graph.boxes[a].op - !graph.boxes[b].op || a - b);
    return columns;
}

/**
 * Values that pass by other boxes run below, one lane for each: {from, to}. `from` is null for one that comes from the
 * segment before, and `out` says that it goes on to the next.
 */
function busesOf(graph, indices, places, last) {
    const inside = new Set(indices);
    const here = graph.boxes[indices[0]].segment;
    const buses = new Map();
    const take = (key, from) => buses.get(key) || buses.set(key, { from, to: [], out: false }).get(key);
    for (const index of indices) {
        const box = graph.boxes[index];
        for (const input of box.inputs) {
            if (inside.has(input)) {
                if (places.get(index).column - places.get(input).column > 1) take(input, input).to.push(index);
            } else if (graph.boxes[input].segment === here - 1 && !entersStraight(graph, input, places.get(index))) {
                take(input, null).to.push(index);
            }
        }
        const leaves = box.users.some((user) => !inside.has(user));
        if (leaves && !(places.get(index).column === last && places.get(index).row === 0))
            take(index, index).out = true;
    }
    return [...buses.values()];
}

/** Whether a value comes in at the left edge, on the line of the first box: from the end of the segment before. */
function entersStraight(graph, input, place) {
    const segment = graph.segments[graph.boxes[input].segment];
    return place.column === 0 && place.row === 0 && segment.boxes[segment.boxes.length - 1] === input;
}

/** Rows of brackets for what has lost, such that none overlaps: [{loss, lane, from, to}]. */
function bracketsOf(losses, places) {
    const spans = losses.map((loss) => {
        const inside = loss.fusion.boxes.filter((index) => places.has(index)).map((index) => places.get(index).column);
        return { loss, from: Math.min(...inside), to: Math.max(...inside) };
    });
    spans.sort((a, b) => a.from - b.from || b.to - a.to);
    const ends = [];
    for (const span of spans) {
        const free = ends.findIndex((end) => end < span.from);
        span.lane = free < 0 ? ends.length : free;
        ends[span.lane] = span.to;
    }
    return spans;
}
