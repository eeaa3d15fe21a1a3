// The lines and areas of a drawing: fused regions, the flow of data, and what holds a bracket to its boxes.

/** The SVG below the boxes of one segment. */
function figureOf(graph, indices, layout, metrics, regions, brackets) {
    const size = { width: layout.width, height: layout.height, viewBox: `0 0 ${layout.width} ${layout.height}` };
    return svg(
        "svg.lines",
        { ...size, "aria-hidden": "true" },
        regions.map((region) => regionShape(region, layout, metrics)),
        metrics.detailed ? flowOf(graph, indices, layout) : straightOf(layout),
        brackets.map((bracket) => ticksOf(bracket, layout, metrics)),
    );
}

/** The boxes that a fusion takes, grown and joined to one area; open at the side where it goes on. */
function regionShape({ fusion, before, after }, layout, metrics) {
    const places = fusion.boxes.filter((index) => layout.boxes.has(index)).map((index) => layout.boxes.get(index));
    places.sort((a, b) => a.column - b.column || a.row - b.row);
    const shapes = (grow) => [
        ...places.map((place) => {
            const below = place.row === 0 ? metrics.label : 0;
            return svg("rect", {
                x: place.x - metrics.pad - grow,
                y: place.y - metrics.pad - grow,
                rx: 7,
                width: place.w + 2 * (metrics.pad + grow),
                height: place.h + below + 2 * (metrics.pad + grow),
            });
        }),
        ...places.slice(1).map((place, at) => bridge(places[at], place, metrics, grow)),
        before ? bridge({ ...places[0], x: -places[0].w }, places[0], metrics, grow) : null,
        after ? bridge(places.at(-1), { ...places.at(-1), x: layout.width }, metrics, grow) : null,
    ];
    return svg(
        "g.region",
        { "data-rule": ruleHue(fusion.rule), "data-fusion": fusion.id, "data-key": `fusion ${fusion.id}` },
        svg("g.region-line", shapes(2)),
        svg("g.region-area", shapes(0)),
    );
}

/** By how much a joint reaches under the boxes that it joins, so that no seam shows. */
const LAP = 10;

/** What joins two boxes of a region: as high as they are where they are neighbours, else a thin band. */
function bridge(left, right, metrics, grow) {
    const whole = left.row === right.row && right.column - left.column <= 1;
    const below = left.row === 0 ? metrics.label : 0;
    if (whole) {
        return svg("rect", {
            x: left.x + left.w - LAP,
            width: Math.max(0, right.x - left.x - left.w + 2 * LAP),
            y: left.y - metrics.pad - grow,
            height: left.h + below + 2 * (metrics.pad + grow),
        });
    }
    const [x1, y1, x2, y2] = [left.x + left.w, left.y + left.h / 2, right.x, right.y + right.h / 2];
    return svg("path.band", {
        d: `M${x1} ${y1} C${x1 + 14} ${y1} ${x2 - 14} ${y2} ${x2} ${y2}`,
        "stroke-width": 10 + 2 * grow,
    });
}

/** Edges between neighbours, stubs to the segments before and after, and the lanes below. */
function flowOf(graph, indices, layout) {
    const paths = [];
    for (const index of indices) {
        const place = layout.boxes.get(index);
        for (const input of graph.boxes[index].inputs) {
            const from = layout.boxes.get(input);
            if (from && place.column - from.column === 1) paths.push(curve(from, place));
            if (
                !from &&
                entersStraight(graph, input, place) &&
                graph.boxes[input].segment === graph.boxes[index].segment - 1
            ) {
                paths.push(`M0 ${middle(place)} H${place.x}`);
            }
        }
        const leaves = graph.boxes[index].users.some((user) => !layout.boxes.has(user));
        if (leaves && place.column === layout.last && place.row === 0) {
            paths.push(`M${place.x + place.w} ${middle(place)} H${layout.width}`);
        }
    }
    layout.buses.forEach((bus, lane) => paths.push(...busPaths(bus, layout.bus(lane), layout)));
    return svg(
        "g.flow",
        paths.map((d) => svg("path", { d })),
    );
}

const middle = (place) => place.y + place.h / 2;

function curve(from, to) {
    const [x1, y1, x2, y2] = [from.x + from.w, middle(from), to.x, middle(to)];
    const bend = (x2 - x1) / 2;
    return `M${x1} ${y1} C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
}

/** Down beside the source, along the lane, and up beside each target; corners are round. */
function busPaths(bus, y, layout) {
    const from = bus.from === null ? null : layout.boxes.get(bus.from);
    const ends = bus.to.map((index) => layout.boxes.get(index)).sort((a, b) => a.x - b.x);
    const right = bus.out ? layout.width : null;
    const paths = [];
    const start = from ? from.x + from.w + 8 : 0;
    const begin = from
        ? `M${from.x + from.w} ${middle(from) + 8} H${start - 4} q4 0 4 4 V${y - 4} q0 4 4 4`
        : `M0 ${y}`;
    for (const end of ends) {
        const x = end.x - 8;
        paths.push(`${begin} H${x - 4} q4 0 4 -4 V${middle(end) + 12} q0 -4 4 -4 H${end.x}`);
    }
    if (right !== null) paths.push(`${begin} H${right}`);
    return paths;
}

/** In a compact drawing one line says enough. */
function straightOf(layout) {
    const places = [...layout.boxes.values()].filter((place) => place.row === 0);
    return svg("g.flow", svg("path", { d: `M0 ${middle(places[0])} H${layout.width}` }));
}

/** Dashes from a bracket down to each box that its fusion would take, and a cross at the box that was taken. */
function ticksOf({ loss, lane }, layout, metrics) {
    const { fusion } = loss;
    const top = lane * metrics.lane + metrics.lane - 4;
    const contested = fusion.boxes.find((index) => GRAPHS[fusion.graph].boxes[index].members.includes(fusion.site));
    return svg(
        "g.ticks",
        { "data-rule": ruleHue(fusion.rule), "data-fusion": fusion.id, "data-key": `fusion ${fusion.id}` },
        fusion.boxes
            .filter((index) => layout.boxes.has(index))
            .map((index) => {
                const place = layout.boxes.get(index);
                const x = place.x + place.w / 2;
                const end = place.row === 0 ? place.y : place.y + 3;
                return [
                    svg("path", { d: `M${x} ${top} V${end}` }),
                    loss.winners.length && index === contested ? crossAt(x, place.y - metrics.pad) : null,
                ];
            }),
    );
}

const crossAt = (x, y) =>
    svg(
        "g.cross",
        { transform: `translate(${x} ${y})` },
        svg("circle", { r: 6 }),
        svg("path", { d: "M-2.6 -2.6 L2.6 2.6 M2.6 -2.6 L-2.6 2.6" }),
    );
