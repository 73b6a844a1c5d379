// Each figure opens by itself, to be looked at closely; on a phone one of up to 520 pixels is shown whole (book.css).
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("article :is(figure, .cell_output) img")) {
    const link = picture.closest("a") ?? document.createElement("a");
    link.classList.add("whole-figure");
    link.href ||= picture.src;
    if (!link.contains(picture)) {
      picture.replaceWith(link);
      link.append(picture);
    }
    const mark = () => link.classList.toggle("fits", picture.naturalWidth <= 520);
    picture.complete ? mark() : picture.addEventListener("load", mark);
  }
  for (const cell of document.querySelectorAll("article td")) {
    cell.classList.toggle("interval", /^[-+\d.]+ \[[^\]]*\]$/.test(cell.textContent.trim()));
  }
});
