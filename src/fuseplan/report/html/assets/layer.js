// One segment as a drawing that can be walked through: boxes, fused regions, what has lost, and near misses.

/** What a policy does in a segment: its regions, with whether they reach beyond it, and its losers. */
function happeningsIn(graph, segment, policy, range) {
    const inside = new Set(segment.boxes);
    const here = (fusion) => fusion.boxes.some((index) => inside.has(index));
    const regions = choiceOf(policy, range, graph.index)
        .applied.filter(({ fusion }) => here(fusion))
        .map((each) => ({
            ...each,
            before: each.fusion.boxes.some((index) => graph.boxes[index].segment < segment.index),
            after: each.fusion.boxes.some((index) => graph.boxes[index].segment > segment.index),
            home: inside.has(homeOf(each.fusion)),
        }));
    const losses = losersOf(policy, range, graph.index).filter(({ fusion }) => here(fusion));
    return { regions, losses };
}

/** The box of the op that a fusion is about. */
const homeOf = rememberedBy((fusion) => {
    const { boxes } = GRAPHS[fusion.graph];
    const found = fusion.boxes.find((index) => boxes[index].members.includes(fusion.site));
    return found === undefined ? fusion.boxes[0] : found;
});

/** Segments with the same text look alike: the same boxes, edges, fusions, losers and near misses. */
function likenessOf(graph, segment, policy, range) {
    const at = new Map(segment.boxes.map((index, place) => [index, place]));
    const placed = (index) => (at.has(index) ? at.get(index) : graph.boxes[index].segment - segment.index);
    const { regions, losses } = happeningsIn(graph, segment, policy, range);
    const relative = (fusion) => `${fusion.rule} ${fusion.op} ${fusion.provider} ${fusion.boxes.map(placed)}`;
    return JSON.stringify([
        segment.boxes.map((index) => {
            const box = graph.boxes[index];
            const inputs = box.inputs.map((input) => (at.has(input) ? at.get(input) : "out"));
            return [box.title, box.subtitle, box.calls, inputs, box.marks];
        }),
        regions.map(({ fusion, saving, before, after }) => [relative(fusion), saving, before, after]),
        losses.map(({ fusion, lost, flips, forbidden }) => [relative(fusion), lost, flips, forbidden]),
    ]);
}

/** The drawing of a segment, as wide as there is room for. */
function layerFigure(graph, segment, metrics) {
    const { regions, losses } = happeningsIn(graph, segment, STATE.policy, STATE.range);
    const plain = layoutOf(graph, segment.boxes, metrics, 0);
    const brackets = metrics.detailed ? bracketsOf(losses, plain.boxes) : [];
    const lanes = brackets.length ? Math.max(...brackets.map((each) => each.lane)) + 1 : 0;
    const layout = lanes ? layoutOf(graph, segment.boxes, metrics, lanes) : plain;
    const owners = new Map(regions.flatMap((region) => region.fusion.boxes.map((index) => [index, region])));
    const figure = el(
        metrics.detailed ? "div.layer-figure" : "div.layer-figure.compact",
        { style: { width: `${layout.width}px`, height: `${layout.height}px` } },
        figureOf(graph, segment.boxes, layout, metrics, regions, brackets),
        brackets.map((bracket) => bracketItem(bracket, layout, metrics)),
        segment.boxes.map((index) => boxItem(graph.boxes[index], layout.boxes.get(index), owners.get(index), metrics)),
        metrics.detailed ? regions.map((region) => regionItem(region, graph, layout, metrics)) : [],
        segment.boxes.flatMap((index) => markItem(graph.boxes[index], layout.boxes.get(index), metrics)),
    );
    return el("div.layer-scroll", figure);
}

/** What arrow keys lead to; see `openFocus`. */
const itemOf = (kind, attributes, ...children) => el(kind, { tabindex: "-1", ...attributes }, ...children);

const at = (x, y, w, h) => ({ left: `${x}px`, top: `${y}px`, width: `${w}px`, ...(h ? { height: `${h}px` } : {}) });

function boxItem(box, place, region, metrics) {
    const rule = region ? region.fusion.rule : null;
    const shown = metrics.detailed ? [box.title, box.subtitle].filter(Boolean).join(" ") : shortTitle(box);
    const words = [
        shown,
        box.op && !metrics.detailed ? box.op : null,
        box.source,
        region ? `in ${rule} by ${region.fusion.provider}` : null,
        box.marks.length ? plural(box.marks.length, "near miss", "near misses") : null,
    ];
    return itemOf(
        box.op ? "button.item.box.op" : "button.item.box",
        {
            "data-key": `box ${box.graph} ${box.index}`,
            style: at(place.x, place.y, place.w, place.h),
            "data-rule": region ? ruleHue(rule) : null,
            "aria-label": words.filter(Boolean).join(", "),
            title: [box.op || box.title, box.source, box.line, box.value].filter(Boolean).join("\n"),
            onclick: (event) => select({ kind: "box", graph: box.graph, box: box.index }, event),
        },
        el("span.box-title", metrics.detailed ? breakable(box.title) : shortTitle(box)),
        metrics.detailed && box.subtitle ? [" ", el("span.box-more", box.subtitle)] : null,
    );
}

const SHORT = { fused_add_rms_norm: "add+norm", rms_norm: "norm", all_reduce: "all_reduce", silu_and_mul: "silu·mul" };

const shortTitle = (box) => SHORT[box.op] || box.title;

/** The name of a region inside it, below the boxes; where its op lies in another segment, only that it goes on. */
function regionItem({ fusion, saving, before, after, home }, graph, layout, metrics) {
    const places = fusion.boxes.filter((index) => layout.boxes.has(index)).map((index) => layout.boxes.get(index));
    const left = before ? 2 : Math.min(...places.map((place) => place.x)) - metrics.pad;
    const right = after ? layout.width - 2 : Math.max(...places.map((place) => place.x + place.w)) + metrics.pad;
    const top =
        Math.max(...places.filter((place) => place.row === places[0].row).map((place) => place.y + place.h)) +
        metrics.pad / 2;
    const worth = home && saving !== null ? us(saving, 2) : null;
    const provider = home && right - left > 200 ? fusion.provider : null;
    const way = after ? "goes on in the next segment" : before ? "from the segment before" : null;
    const words = [[fusion.rule, provider, worth].filter(Boolean).join(" "), "fused region", way];
    return itemOf(
        "button.item.region-name",
        {
            "data-key": `fusion ${fusion.id}${home ? "" : " part"}`,
            "data-fusion": fusion.id,
            "data-rule": ruleHue(fusion.rule),
            style: at(left, top, right - left, metrics.label),
            "aria-label": words.filter(Boolean).join(", "),
            title: `${fusion.rule} · ${fusion.op} · ${fusion.provider}`,
            onclick: (event) => select({ kind: "fusion", fusion: fusion.id }, event),
        },
        before && !home ? el("span", { "aria-hidden": "true" }, "↤") : null,
        el("b", fusion.rule),
        provider ? [" ", el("span", provider)] : null,
        worth ? [" ", el("i", worth)] : null,
        after ? el("span", { "aria-hidden": "true" }, "↦") : null,
    );
}

/** A bracket above the boxes that a losing fusion would take. */
function bracketItem({ loss, lane, from, to }, layout, metrics) {
    const { fusion } = loss;
    const places = [...layout.boxes.values()].filter((place) => place.column >= from && place.column <= to);
    const left = Math.min(...places.map((place) => place.x));
    const right = Math.max(...places.map((place) => place.x + place.w));
    const better = loss.lost !== null && loss.lost < 0;
    const why = whyLost(loss);
    const figure = loss.forbidden || loss.lost === null ? why : marginText(loss.lost, 2);
    return itemOf(
        better ? "button.item.bracket.better" : "button.item.bracket",
        {
            "data-key": `fusion ${fusion.id}`,
            "data-fusion": fusion.id,
            "data-rule": ruleHue(fusion.rule),
            style: at(left, lane * metrics.lane, right - left, metrics.lane - 4),
            "aria-label": `${fusion.rule} ${figure}, candidate of ${fusion.provider} that lost, ${why}`,
            title: `${fusion.rule} · ${fusion.op} · ${fusion.provider}\n${why}`,
            onclick: (event) => select({ kind: "fusion", fusion: fusion.id }, event),
        },
        el("span.no", { "aria-hidden": "true" }, "✕"),
        el("b", fusion.rule),
        " ",
        el("i", figure),
    );
}

function whyLost(loss) {
    if (loss.forbidden) return "forbidden";
    const winners = [...new Set(loss.winners.map((fusion) => fusion.rule))];
    if (winners.length) return `taken by ${winners.join(" and ")}`;
    return loss.lost === null ? "can't be applied" : "not worth it";
}

/** A triangle at a box where a rule nearly matches; hollow where another provider takes the match. */
function markItem(box, place, metrics) {
    if (!box.marks.length) return [];
    const misses = box.marks.map((index) => VIEW.misses[index]);
    const faint = misses.every(isFaint);
    if (faint && !metrics.detailed) return [];
    return [
        itemOf(
            faint ? "button.item.near.faint" : "button.item.near",
            {
                "data-key": `near ${box.graph} ${box.index}`,
                style: { left: `${place.x + place.w - 11}px`, top: `${place.y - 7}px` },
                "aria-label": `near miss: ${misses.map(missText).join("; ")}`,
                title: misses.map(missText).join("\n"),
                onclick: (event) =>
                    select({ kind: "miss", miss: box.marks[0], graph: box.graph, box: box.index }, event),
            },
            nearGlyph(faint),
        ),
    ];
}

const missText = (miss) => `${miss.rule || miss.op || "no rule"}, ${miss.nearness}: ${miss.detail}`;

const nearGlyph = (faint) =>
    svg(
        faint ? "svg.glyph.faint" : "svg.glyph",
        { viewBox: "0 0 14 13", width: 14, height: 13, "aria-hidden": "true" },
        svg("path", { d: "M7 1.2 L13 12 H1 Z" }),
        faint ? null : svg("path.stroke", { d: "M7 5 V8.4 M7 10 V10.4" }),
    );
