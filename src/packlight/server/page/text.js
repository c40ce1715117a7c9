// A model's text as paragraphs and fenced code, made of text nodes alone.

import { element } from "/page/dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;

/** Paragraphs and fenced blocks of a text that may still be growing: `{kind, language, text}` each. */
export function blocks(text) {
  const found = [];
  let open = null; // the block that lines are added to
  let fence = null; // what closes it, where it is code
  for (const line of text.split("\n")) {
    if (fence !== null) {
      if (closes(line, fence)) open = fence = null;
      else open.lines.push(line);
      continue;
    }
    const start = FENCE.exec(line);
    if (start) {
      fence = start[1];
      open = { kind: "code", language: start[2], lines: [] };
      found.push(open);
    } else if (line.trim() === "") {
      open = null;
    } else {
      if (open === null) found.push((open = { kind: "text", language: "", lines: [] }));
      open.lines.push(line);
    }
  }
  return found.map(({ kind, language, lines }) => ({ kind, language, text: lines.join("\n") }));
}

/** Show a text in a node. Blocks that did not change are left alone, so that a stream is cheap and a selection stays. */
export function render(node, text) {
  const wanted = blocks(text);
  wanted.forEach((block, place) => {
    let child = node.children[place];
    if (!child || child.dataset.kind !== block.kind || child.dataset.language !== block.language) {
      const made = blockElement(block);
      if (child) child.replaceWith(made);
      else node.append(made);
      child = made;
    }
    const target = child.querySelector("code") ?? child;
    if (target.textContent !== block.text) target.textContent = block.text;
  });
  while (node.children.length > wanted.length) node.lastElementChild.remove();
}

function closes(line, fence) {
  const bare = line.trim();
  return bare.length >= fence.length && bare === fence[0].repeat(bare.length);
}

function blockElement({ kind, language }) {
  const marks = { "data-kind": kind, "data-language": language };
  if (kind === "text") return element("p", marks);
  const label = language ? element("figcaption", {}, language) : null;
  return element("figure", { ...marks, class: "code" }, label, element("pre", { tabindex: "0" }, element("code")));
}
